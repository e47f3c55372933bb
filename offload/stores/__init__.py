"""Where backups live, one kind a file."""
