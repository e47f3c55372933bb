"""The open backup-offload proxy for virtual machines."""

__version__ = "0.1.0"
