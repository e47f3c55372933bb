"""Hypervisors: what production runs on, and where placeholders stand."""
