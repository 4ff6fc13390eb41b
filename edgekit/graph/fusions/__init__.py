"""Fusion of decomposed forms into whole operators, one file an operator."""
