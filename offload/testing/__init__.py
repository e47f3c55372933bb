"""Contract suites: what every provider, target and store must pass, ours and third parties'."""
