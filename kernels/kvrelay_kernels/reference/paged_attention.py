"""Paged attention by gathering the blocks and calling torch's attention; also the fallback on a CPU."""

import torch
from torch.nn import functional

from kvrelay_kernels.layout import AttentionLayout

_GATHER_BYTES = 256 << 20
"""Bound on the gathered keys of one decode call, whatever the number and length of sequences."""
_CPU_GATHER_BYTES = 2 << 20
"""On a CPU the copy should stay in cache; larger ones cost a page fault every 4 KiB each time."""


def paged_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """`kvrelay_kernels.paged_attention.paged_attention` on any device, in any dtype."""
    decodes = layout.num_decodes
    if decodes:
        _decode(
            query[:decodes],
            key_cache,
            value_cache,
            layout,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            out=out[:decodes],
        )
    row = decodes
    for index in range(decodes, len(layout.host_query_lens)):
        rows = slice(row, row + layout.host_query_lens[index])
        out[rows] = _chunk(
            query[rows],
            key_cache,
            value_cache,
            table=layout.block_tables[index],
            context=layout.host_context_lens[index],
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
        )
        row = rows.stop
    return out


def _decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    out: torch.Tensor,
) -> None:
    """One query a sequence, in groups whose gathered keys stay within a fixed size."""
    rows = query.shape[0]
    _, block_size, kv_heads, head_dim = key_cache.shape
    blocks = -(-max(layout.host_context_lens[:rows]) // block_size)
    if sliding_window is not None:
        blocks = min(blocks, _window_blocks(sliding_window, block_size))
    row_bytes = blocks * block_size * kv_heads * head_dim * key_cache.itemsize
    limit = _CPU_GATHER_BYTES if query.device.type == "cpu" else _GATHER_BYTES
    step = max(1, limit // row_bytes)
    for first in range(0, rows, step):
        group = slice(first, min(first + step, rows))
        out[group] = _decode_group(
            query[group],
            key_cache,
            value_cache,
            tables=layout.block_tables[group],
            lengths=layout.context_lens[group],
            longest=max(layout.host_context_lens[group]),
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
        )


def _decode_group(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Gather the padded blocks of all rows and attend in one call."""
    rows, heads, head_dim = query.shape
    _, block_size, kv_heads, _ = key_cache.shape
    blocks = -(-longest // block_size)
    lengths = lengths.unsqueeze(1)
    tables = tables[:, :blocks].long()
    last = (lengths - 1).long()
    newest = tables.gather(1, last // block_size) * block_size + last % block_size
    position = torch.arange(blocks * block_size, device=query.device, dtype=torch.int32).unsqueeze(
        0
    )
    if sliding_window is not None and blocks > _window_blocks(sliding_window, block_size):
        # Each row reads its own run of blocks: the window ends at the row's own length.
        width = _window_blocks(sliding_window, block_size)
        first = ((lengths - sliding_window).clamp(min=0) // block_size).clamp(max=blocks - width)
        columns = first + torch.arange(width, device=query.device, dtype=torch.int32)
        tables = tables.gather(1, columns.long())
        position = first * block_size + position[:, : width * block_size]
    visible = position < lengths
    if sliding_window is not None:
        visible = visible & (position >= lengths - sliding_window)
    offset = torch.arange(block_size, device=query.device)
    slots = (tables.unsqueeze(2) * block_size + offset).flatten(1)
    # Invisible places read the row's own newest token: masked weights are zero, but zero times the
    # NaN or infinity that another sequence may have left in a block would not be.
    slots = slots.where(visible, newest).flatten()
    shape = (rows, -1, kv_heads, head_dim)
    flat = (-1, kv_heads, head_dim)
    key = key_cache.view(flat).index_select(0, slots).view(shape).transpose(1, 2)
    value = value_cache.view(flat).index_select(0, slots).view(shape).transpose(1, 2)
    # The query heads of one KV head stand in the place of query positions, so nothing is repeated.
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    mask = visible[:, None, None, :]
    attended = _attend(grouped, key, value, mask=mask, scale=scale, soft_cap=soft_cap)
    return attended.reshape(rows, heads, head_dim)


def _window_blocks(sliding_window: int, block_size: int) -> int:
    """Blocks that a window can touch when it starts at the last slot of one."""
    return (sliding_window - 1 + block_size - 1) // block_size + 1


def _chunk(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    table: torch.Tensor,
    context: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Several queries of one sequence over its cached prefix and themselves."""
    new, heads, head_dim = query.shape
    _, block_size, kv_heads, _ = key_cache.shape
    start = context - new
    skipped = 0
    if sliding_window is not None:
        skipped = max(0, start - sliding_window + 1) // block_size
    blocks = table[skipped : -(-context // block_size)]
    keys = context - skipped * block_size
    group = heads // kv_heads
    shape = (-1, kv_heads, head_dim)
    key = key_cache.index_select(0, blocks).view(shape)[:keys].permute(1, 0, 2)
    value = value_cache.index_select(0, blocks).view(shape)[:keys].permute(1, 0, 2)
    windowed = sliding_window is not None and context > sliding_window
    mask = None
    if start or windowed or soft_cap is not None:
        columns = torch.arange(skipped * block_size, context, device=query.device)
        rows = torch.arange(start, context, device=query.device).unsqueeze(1)
        mask = columns <= rows
        if sliding_window is not None:
            mask &= columns > rows - sliding_window
    # KV heads are the batch and the heads of a group share one key by a stride of zero: no copies.
    attended = _attend(
        query.reshape(query.shape[0], kv_heads, group, -1).permute(1, 2, 0, 3),
        key.unsqueeze(1).expand(-1, group, -1, -1),
        value.unsqueeze(1).expand(-1, group, -1, -1),
        mask=mask,
        scale=scale,
        soft_cap=soft_cap,
    )
    return attended.permute(2, 0, 1, 3).reshape(new, heads, head_dim)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    scale: float,
    soft_cap: float | None,
) -> torch.Tensor:
    """Attention of four dimensions, in the dtype of the queries; without a mask it is causal."""
    key, value = key.to(query.dtype), value.to(query.dtype)
    if soft_cap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    scores = (query.float() @ key.float().mT) * scale
    scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value.float()).to(query.dtype)
