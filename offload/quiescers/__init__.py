"""Quiescers, one a file."""
