"""The prefill worker: reads prompts and pushes their KV blocks to a decode worker."""
