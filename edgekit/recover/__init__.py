"""Objectives by which a rewritten network wins back what it lost."""
