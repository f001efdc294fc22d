"""The decode worker: receives KV blocks (or prefills locally) and writes answers."""
