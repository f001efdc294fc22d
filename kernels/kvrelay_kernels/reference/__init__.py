"""Torch references: what every kernel is compared with, and the fallback where it does not exist."""
