"""`kvrelay bench engine`: offline throughput of this engine, beside the machine's limits."""
