"""Text on both sides of the model: chat template, tokenizer, incremental detokenising, stop strings."""
