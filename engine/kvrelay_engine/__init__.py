"""What is computed: models, weights, KV pool, block allocator, sampler, worker runtime."""
