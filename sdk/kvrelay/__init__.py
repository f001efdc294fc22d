"""kvrelay: the Python client."""
