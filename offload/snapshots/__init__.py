"""Snapshot providers, one a file."""
