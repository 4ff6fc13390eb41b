"""Benchmarks: each a command that prints ratios of two things timed in turn in one run."""
