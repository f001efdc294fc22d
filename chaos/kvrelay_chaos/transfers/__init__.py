"""Faults of single transfers: processes killed at random bytes, bits flipped in flight."""
