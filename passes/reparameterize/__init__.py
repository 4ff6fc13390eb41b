"""Exact structural rewritings: several operators become one that computes the same."""
