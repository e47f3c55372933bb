"""Where restored images go; see `offload.sink`."""
