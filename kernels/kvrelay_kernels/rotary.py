"""Rotary position embedding, applied in place to packed queries and keys.

With `x = [x1, x2]` the two halves of the rotated part of a head, and the angles of the row's position:

    x1' = x1 * cos - x2 * sin
    x2' = x2 * cos + x1 * sin

Source: Su et al., "RoFormer", 2021 (arXiv:2104.09864), in the half-split arrangement of GPT-NeoX that
every supported family uses. Dimensions past twice the number of angles are left as they are.
"""

import torch

from kvrelay_kernels.checks import check_dtype, check_shape


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> None:
    """Rotate `query` and `key` in place.

    Args:
        query: `[tokens, query_heads, head_dim]`, any float dtype, may be a strided view.
        key: `[tokens, kv_heads, head_dim]`, dtype of `query`, may be a strided view.
        cos: `[tokens, angles]` float32, `2 * angles <= head_dim`.
        sin: `[tokens, angles]` float32.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    tokens, _, head_dim = query.shape
    angles = cos.shape[-1]
    check_shape("key", key, (tokens, None, head_dim))
    check_shape("cos", cos, (tokens, angles))
    check_shape("sin", sin, (tokens, angles))
    check_dtype("cos", cos, torch.float32)
    check_dtype("sin", sin, torch.float32)
    if 2 * angles > head_dim:
        raise ValueError(f"cos has {angles} angles, too many for head_dim {head_dim}")
    wide_cos, wide_sin = cos.unsqueeze(1), sin.unsqueeze(1)
    _rotate(query, wide_cos, wide_sin)
    _rotate(key, wide_cos, wide_sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    angles = cos.shape[-1]
    first, second = x[..., :angles], x[..., angles : 2 * angles]
    # Both products are float32 by promotion, so bfloat16 heads are rounded once, at the copy.
    rotated = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(rotated)
