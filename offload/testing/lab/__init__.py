"""The lab guest: a virtual machine in which the kernel's own parts run, on this host's files."""
