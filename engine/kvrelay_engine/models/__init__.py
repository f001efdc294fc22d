"""Model descriptions, weights and the fused decoder of the Llama-shaped families."""
