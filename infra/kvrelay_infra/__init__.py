"""Where workers run: the provider for local processes."""
