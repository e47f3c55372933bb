"""Parts of the configuration, a subject a file."""
