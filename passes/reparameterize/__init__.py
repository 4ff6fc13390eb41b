"""Structural reparameterization: rewrites of linear operators that are exact in real arithmetic."""
