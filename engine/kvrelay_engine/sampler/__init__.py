"""Counter-based sampling: a draw is a function of (seed, position, logits)."""
