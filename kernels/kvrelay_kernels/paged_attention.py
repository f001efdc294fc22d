"""Causal attention of packed queries over a paged KV pool, with grouped query heads.

For query row i of a sequence with `context` tokens in the pool, `new` of them being its queries, the
row's position is `p = context - new + i` and it sees the keys at positions j with

    j <= p   and, with a sliding window w,   j > p - w
    out = softmax(scale * q @ K[j].T) @ V[j]

Query head h reads KV head `h // (query_heads / kv_heads)`. The key of position j lies in block
`block_table[j // block_size]` at offset `j % block_size`.

Sources: Kwon et al., "PagedAttention", 2023 (arXiv:2309.06180); Ainslie et al., "GQA", 2023
(arXiv:2305.13245); the window of Beltagy et al., "Longformer", 2020 (arXiv:2004.05150), as Mistral
uses it (a row sees itself and the `w - 1` tokens before it).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from kvrelay_kernels.checks import check_dtype, check_shape

_GATHER_BYTES = 256 << 20
"""Bound on the gathered keys of one decode call, whatever the number and length of sequences."""
_CPU_GATHER_BYTES = 2 << 20
"""On a CPU the copy should stay in cache; larger ones cost a page fault every 4 KiB each time."""


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Where the queries of a step and their KV lie; built once a step, shared by every layer.

    ```
    packed query rows  | d0 | d1 | d2 | s3 s3 s3 s3 | s4 s4 |
                       `- num_decodes -'
                         one row each   `- any length each -'
    ```

    The lengths exist twice: tensors for kernels on the device, tuples for choices made on the host
    without waiting for it.
    """

    block_tables: torch.Tensor
    """`[sequences, max_blocks]` int32 on the device; rows are padded with any valid block."""
    query_starts: torch.Tensor
    """`[sequences + 1]` int32 on the device: first packed row of each sequence, and their total."""
    context_lens: torch.Tensor
    """`[sequences]` int32 on the device: tokens in the pool, the new ones included."""
    host_query_lens: tuple[int, ...]
    host_context_lens: tuple[int, ...]
    num_decodes: int
    """How many leading sequences have exactly one query."""

    def __post_init__(self) -> None:
        sequences = len(self.host_query_lens)
        check_shape("block_tables", self.block_tables, (sequences, None))
        check_shape("query_starts", self.query_starts, (sequences + 1,))
        check_shape("context_lens", self.context_lens, (sequences,))
        if any(length != 1 for length in self.host_query_lens[: self.num_decodes]):
            raise ValueError("a leading decode sequence has more than one query")


def attention_layout(
    block_tables: torch.Tensor, query_lens: Sequence[int], context_lens: Sequence[int]
) -> AttentionLayout:
    """Build a layout from host lengths; leading sequences with one query become the decode part."""
    device = block_tables.device
    starts = [0]
    for length in query_lens:
        starts.append(starts[-1] + length)
    num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
    return AttentionLayout(
        block_tables=block_tables,
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        host_query_lens=tuple(query_lens),
        host_context_lens=tuple(context_lens),
        num_decodes=num_decodes,
    )


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Attend from every packed query row; the new keys and values are already in the cache.

    Args:
        query: `[tokens, query_heads, head_dim]`, dtype of the cache, may be a strided view.
        key_cache: `[num_blocks, block_size, kv_heads, head_dim]`, contiguous.
        value_cache: like `key_cache`.
        layout: which rows belong to which sequence, and its blocks.
        scale: factor of the scores before the softmax.
        sliding_window: how many tokens a row sees, itself included; None for all.

    Returns:
        `[tokens, query_heads, head_dim]`, contiguous, dtype of `query`.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    _, _, kv_heads, head_dim = key_cache.shape
    tokens = sum(layout.host_query_lens)
    check_shape("query", query, (tokens, None, head_dim))
    check_shape("value_cache", value_cache, tuple(key_cache.shape))
    check_dtype("query", query, key_cache.dtype)
    if query.shape[1] % kv_heads:
        raise ValueError(f"{query.shape[1]} query heads do not divide into {kv_heads} KV heads")
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    decodes = layout.num_decodes
    if decodes:
        _decode(
            query[:decodes],
            key_cache,
            value_cache,
            layout,
            scale=scale,
            sliding_window=sliding_window,
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
    attended = functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=visible[:, None, None, :], scale=scale
    )
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
    if start or windowed:
        columns = torch.arange(skipped * block_size, context, device=query.device)
        rows = torch.arange(start, context, device=query.device).unsqueeze(1)
        mask = columns <= rows
        if sliding_window is not None:
            mask &= columns > rows - sliding_window
    # KV heads are the batch and the heads of a group share one key by a stride of zero: no copies.
    attended = functional.scaled_dot_product_attention(
        query.view(new, kv_heads, group, head_dim).permute(1, 2, 0, 3),
        key.unsqueeze(1).expand(-1, group, -1, -1),
        value.unsqueeze(1).expand(-1, group, -1, -1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return attended.permute(2, 0, 1, 3).reshape(new, heads, head_dim)
