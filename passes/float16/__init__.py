"""Passes that make a graph fit for float16."""
