"""Causal attention of packed queries over a paged KV pool, with grouped query heads.

For query row i of a sequence with `context` tokens in the pool, `new` of them being its queries, the
row's position is `p = context - new + i` and it sees the keys at positions j with

    j <= p   and, with a sliding window w,   j > p - w
    s[j] = scale * q @ K[j].T   and, with a soft cap c,   s[j] = c * tanh(s[j] / c)
    out = softmax(s) @ V

Query head h reads KV head `h // (query_heads / kv_heads)`. The key of position j lies in block
`block_table[j // block_size]` at offset `j % block_size`.

Sources: Kwon et al., "PagedAttention", 2023 (arXiv:2309.06180); Ainslie et al., "GQA", 2023
(arXiv:2305.13245); the window of Beltagy et al., "Longformer", 2020 (arXiv:2004.05150), as Mistral
uses it (a row sees itself and the `w - 1` tokens before it); the cap of "Gemma 2", 2024
(arXiv:2408.00118).
"""

import torch

from kvrelay_kernels.checks import check_dtype, check_shape
from kvrelay_kernels.cpu.library import native
from kvrelay_kernels.cpu.paged_attention import paged_attention_cpu
from kvrelay_kernels.layout import AttentionLayout, attention_layout
from kvrelay_kernels.reference.paged_attention import paged_attention_reference

__all__ = ["AttentionLayout", "attention_layout", "paged_attention"]


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from every packed query row; the new keys and values are already in the cache.

    Args:
        query: `[tokens, query_heads, head_dim]`, dtype of the cache or float32, any
            16-bit float dtype for an 8-bit cache; may be a strided view.
        key_cache: `[num_blocks, block_size, kv_heads, head_dim]`, contiguous, any float dtype. Slots
            that no row sees may hold anything, NaN included.
        value_cache: like `key_cache`.
        layout: which rows belong to which sequence, and its blocks.
        scale: factor of the scores before the softmax.
        sliding_window: how many tokens a row sees, itself included; None for all.
        soft_cap: bound that the scores approach; None for none.
        out: `[tokens, query_heads, head_dim]`, contiguous, dtype of `query`; None allocates.

    Returns:
        `out`.

    Raises:
        ValueError: shapes or dtypes do not match, or a window or cap is not positive.
    """
    out = _checked_out(query, key_cache, value_cache, layout, out)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}, expected at least 1")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap is {soft_cap}, expected more than 0")
    if query.device.type == "cuda":
        from kvrelay_kernels.cuda.paged_attention import paged_attention_cuda

        return paged_attention_cuda(
            query,
            key_cache,
            value_cache,
            layout,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            out=out,
        )
    library = native(query, out, supported=query.shape[2] % 16 == 0)
    if library is not None:
        paged_attention_cpu(
            library,
            query,
            key_cache,
            value_cache,
            layout,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            out=out,
        )
        return out
    return paged_attention_reference(
        query,
        key_cache,
        value_cache,
        layout,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        out=out,
    )


def _checked_out(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    layout: AttentionLayout,
    out: torch.Tensor | None,
) -> torch.Tensor:
    check_shape("key_cache", key_cache, (None, None, None, None))
    _, _, kv_heads, head_dim = key_cache.shape
    tokens = sum(layout.host_query_lens)
    check_shape("query", query, (tokens, None, head_dim))
    check_shape("value_cache", value_cache, tuple(key_cache.shape))
    check_dtype("value_cache", value_cache, key_cache.dtype)
    # A cache of one-byte numbers serves activations of either 16-bit format.
    wide = (torch.bfloat16, torch.float16) if key_cache.itemsize == 1 else (key_cache.dtype,)
    check_dtype("query", query, *wide, torch.float32)
    if query.shape[1] % kv_heads:
        raise ValueError(f"{query.shape[1]} query heads do not divide into {kv_heads} KV heads")
    if out is None:
        return torch.empty(query.shape, dtype=query.dtype, device=query.device)
    check_shape("out", out, tuple(query.shape))
    check_dtype("out", out, query.dtype)
    if not out.is_contiguous():
        raise ValueError("out is not contiguous")
    return out
