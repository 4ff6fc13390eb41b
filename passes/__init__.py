"""Compiler passes: one file a pass, or one folder a family."""
