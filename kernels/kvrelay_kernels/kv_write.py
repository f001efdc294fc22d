"""Scatter of the keys and values of new tokens into their slots of one layer of the paged pool.

    key_cache[slot // block_size, slot % block_size] = key, and the same for values

Source: the slot mapping of Kwon et al., "PagedAttention", 2023 (arXiv:2309.06180).
"""

import torch

from kvrelay_kernels.checks import check_dtype, check_shape


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write one row a token; every slot is written at most once.

    Args:
        key: `[tokens, kv_heads, head_dim]`, dtype of the cache, may be a strided view.
        value: like `key`.
        key_cache: `[num_blocks, block_size, kv_heads, head_dim]`, contiguous.
        value_cache: like `key_cache`.
        slots: `[tokens]` int64, `block * block_size + offset` of each token.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    _, _, kv_heads, head_dim = key_cache.shape
    check_shape("key", key, (slots.shape[0], kv_heads, head_dim))
    check_shape("value", value, tuple(key.shape))
    check_shape("value_cache", value_cache, tuple(key_cache.shape))
    check_dtype("slots", slots, torch.int64)
    check_dtype("key", key, key_cache.dtype)
    check_dtype("value", value, value_cache.dtype)
    key_cache.view(-1, kv_heads, head_dim).index_copy_(0, slots, key)
    value_cache.view(-1, kv_heads, head_dim).index_copy_(0, slots, value)
