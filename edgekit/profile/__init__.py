"""Measuring latency, and the statistics of a measurement."""
