"""Fewer tokens in a trained transformer: which tokens go, and the graph that runs on those that stay."""
