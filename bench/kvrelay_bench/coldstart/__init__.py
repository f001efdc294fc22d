"""From a request that finds no worker to its first token."""
