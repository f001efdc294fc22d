"""`kvrelay bench compare`: this engine beside its peers, on the same weights and cores."""
