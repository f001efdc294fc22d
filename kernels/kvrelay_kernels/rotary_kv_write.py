"""What happens between the fused projection and attention, in one pass over each token.

    q, k = rms_norm(q), rms_norm(k)                    per head, of models that normalise them
    x1', x2' = x1 * cos - x2 * sin, x2 * cos + x1 * sin        for the queries and the keys
    key_cache[slot // block_size, slot % block_size] = k, and the same for the values

`x = [x1, x2]` are the two halves of the rotated part of a head, with the angles of the row's position;
dimensions past twice the number of angles are left as they are.

Sources: Su et al., "RoFormer", 2021 (arXiv:2104.09864), in the half-split arrangement of GPT-NeoX that
every supported family uses; Henry et al., "Query-Key Normalization", 2020 (arXiv:2010.04245), as RMSNorm
in Qwen3; the slot mapping of Kwon et al., "PagedAttention", 2023 (arXiv:2309.06180).
"""

import torch

from kvrelay_kernels.checks import check_dtype, check_shape
from kvrelay_kernels.cpu.library import native
from kvrelay_kernels.cpu.rotary_kv_write import rotary_kv_write_cpu
from kvrelay_kernels.reference.rotary_kv_write import rotary_kv_write_reference


def rotary_kv_write(  # noqa: PLR0917 # tensors by position, settings by name
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate the queries in place, and write the rotated keys and the values into the pool.

    Args:
        qkv: `[tokens, heads + 2 * kv_heads, head_dim]`, any float dtype: query heads, key heads, value
            heads; rows may be further apart. The queries are rotated where they are; what the keys'
            part holds afterwards is not specified.
        key_cache: `[num_blocks, block_size, kv_heads, head_dim]`, contiguous, any float dtype.
        value_cache: like `key_cache`.
        slots: `[tokens]` int64, `block * block_size + offset` of each token, each at most once.
        cos: `[tokens, angles]` float32, `2 * angles <= head_dim`.
        sin: like `cos`.
        query_norm: `[head_dim]`, dtype of `qkv`: weight of the RMSNorm of each query head, before the
            rotation; None for none.
        key_norm: the same for the keys.
        eps: of both norms.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    _check(qkv, key_cache, value_cache, slots, cos, sin)
    head_dim = key_cache.shape[3]
    for name, weight in (("query_norm", query_norm), ("key_norm", key_norm)):
        if weight is not None:
            check_shape(name, weight, (head_dim,))
            check_dtype(name, weight, qkv.dtype)
    if qkv.device.type == "cuda":
        from kvrelay_kernels.cuda.rotary_kv_write import rotary_kv_write_cuda

        rotary_kv_write_cuda(
            qkv,
            key_cache,
            value_cache,
            slots,
            cos,
            sin,
            query_norm=query_norm,
            key_norm=key_norm,
            eps=eps,
        )
        return
    dense = qkv.stride(1) == head_dim and cos.stride(0) == sin.stride(0)
    library = native(qkv, cos, sin, query_norm, key_norm, supported=dense)
    if library is not None:
        rotary_kv_write_cpu(
            library,
            qkv,
            key_cache,
            value_cache,
            slots,
            cos,
            sin,
            query_norm=query_norm,
            key_norm=key_norm,
            eps=eps,
        )
        return
    rotary_kv_write_reference(
        qkv,
        key_cache,
        value_cache,
        slots,
        cos,
        sin,
        query_norm=query_norm,
        key_norm=key_norm,
        eps=eps,
    )


def _check(  # noqa: PLR0917 # the tensors of the op
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    check_shape("key_cache", key_cache, (None, None, None, None))
    _, _, kv_heads, head_dim = key_cache.shape
    check_shape("qkv", qkv, (None, None, head_dim))
    tokens, heads, _ = qkv.shape
    if heads <= 2 * kv_heads:
        raise ValueError(f"qkv has {heads} heads, too few for {kv_heads} KV heads")
    check_shape("value_cache", value_cache, tuple(key_cache.shape))
    check_dtype("value_cache", value_cache, key_cache.dtype)
    check_shape("slots", slots, (tokens,))
    check_dtype("slots", slots, torch.int64)
    angles = cos.shape[-1]
    check_shape("cos", cos, (tokens, angles))
    check_shape("sin", sin, (tokens, angles))
    check_dtype("cos", cos, torch.float32)
    check_dtype("sin", sin, torch.float32)
    if 2 * angles > head_dim:
        raise ValueError(f"cos has {angles} angles, too many for head_dim {head_dim}")
