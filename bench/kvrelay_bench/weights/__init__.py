"""`kvrelay bench weights`: our loader beside a plain client of ranged GETs, from the same local stores."""
