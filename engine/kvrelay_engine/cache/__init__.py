"""The KV cache: the pool owns tensors, the allocator owns indices."""
