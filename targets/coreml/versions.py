"""The deployment targets that ML Programs are written for."""

VERSIONS = ("iOS15", "iOS16", "iOS17", "iOS18")
"""Minimum deployment targets, oldest first; iOS15 stands for macOS12, watchOS8 and tvOS15 too, and so on."""
