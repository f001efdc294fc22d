"""Head normalisation, rotation and the write into the pool in torch, one after the other."""

import torch

from kvrelay_kernels.reference.rms_norm import rms_norm_reference


def rotary_kv_write_reference(  # noqa: PLR0917 # tensors by position, settings by name
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
) -> None:
    """`kvrelay_kernels.rotary_kv_write.rotary_kv_write` on any device, in any dtype."""
    _, _, kv_heads, head_dim = key_cache.shape
    heads = qkv.shape[1] - 2 * kv_heads
    query, key, value = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    if query_norm is not None:
        query.copy_(rms_norm_reference(query, query_norm, eps, out=torch.empty_like(query)))
    key = (
        key.clone()
        if key_norm is None
        else rms_norm_reference(key, key_norm, eps, out=torch.empty_like(key))
    )
    wide_cos, wide_sin = cos.unsqueeze(1), sin.unsqueeze(1)
    _rotate(query, wide_cos, wide_sin)
    _rotate(key, wide_cos, wide_sin)
    flat = (-1, kv_heads, head_dim)
    key_cache.view(flat).index_copy_(0, slots, key.to(key_cache.dtype))
    value_cache.view(flat).index_copy_(0, slots, value.to(value_cache.dtype))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    angles = cos.shape[-1]
    first, second = x[..., :angles], x[..., angles : 2 * angles]
    # Both products are float32 by promotion, so bfloat16 heads are rounded once, at the copy.
    rotated = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(rotated)
