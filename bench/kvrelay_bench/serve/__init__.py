"""`kvrelay bench serve`: load against any OpenAI-compatible server."""
