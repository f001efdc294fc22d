"""`kvrelay bench startup`: from the start of a process to its first token."""
