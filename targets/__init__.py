"""Targets: one folder each, with the lowering to a native format and its runtime."""
