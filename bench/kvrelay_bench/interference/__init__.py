"""`kvrelay bench interference`: what long prompts do to the streams that run beside them."""
