"""Versions of what is said; two processes talk only where these are equal."""

JOIN_VERSION = 4
"""Of the Join stream's messages."""
KV_VERSION = 3
"""Of the KV plane: frame header, payload order, hand-over record."""
