"""Causal paged attention of several queries a sequence, over its cached prefix and themselves.

A program handles `BLOCK_QUERIES` rows of one KV head: so many tokens times the query heads of the
group, which all read the same keys. Tiles of keys that every row sees need no mask and run in the
main loop; those cut by the window come before, those cut by the diagonal after. All sequences share
one launch (`paged_tile_map`), and tiles with the most keys start first, so that short ones fill the
gaps at the end.

The matrix units are the limit: 4 operations for each query row, visible key and dimension. Rows
come in 128s, so Hopper's `wgmma` takes its second operand from shared memory, where `cp.async`
gathers the pages or, where a page holds whole tiles, the tensor memory accelerator copies them.

Source: Dao, "FlashAttention-2", 2023 (arXiv:2307.08691), for the order of loops and the deferred
division; Shah et al., "FlashAttention-3", 2024 (arXiv:2407.08608), for Hopper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kvrelay_kernels.cuda.device import device_traits
from kvrelay_kernels.cuda.paged_softmax import AttentionTraits, base2_scores, lowest
from kvrelay_kernels.cuda.paged_tile_map import prefill_tile_map
from kvrelay_kernels.cuda.registry import AotCase, Expect, Workload
from kvrelay_kernels.layout import AttentionLayout


@triton.jit
def _load_rows(
    cache: tl.tensor,
    descriptor: tl.tensor,
    table: tl.tensor,
    tile: tl.tensor,
    near: tl.tensor,
    column: tl.tensor,
    token_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    TMA: tl.constexpr,
) -> tl.tensor:
    """Keys or values of a tile, `[TILE, BLOCK_DIM]`; row i is the token at position near[i]."""
    if TMA:
        page = tl.load(table + tile // (PAGE // TILE))
        rows = descriptor.load([page * PAGE + tile % (PAGE // TILE) * TILE, column])
    else:
        dim = tl.arange(0, BLOCK_DIM)
        if PAGE % TILE == 0:
            page = tl.load(table + tile // (PAGE // TILE)).to(tl.int64)
            start = cache + page * (PAGE * token_stride) + column
            places = start + (near % PAGE)[:, None] * token_stride + dim[None, :]
        else:
            page = tl.load(table + near // PAGE).to(tl.int64)
            offset = (page * PAGE + near % PAGE) * token_stride + column
            places = cache + offset[:, None] + dim[None, :]
        if HEAD_DIM == BLOCK_DIM:
            rows = tl.load(places)
        else:
            rows = tl.load(places, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    return rows


@triton.jit
def _attend(
    q: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    accumulator: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    key_tiles: tl.tensor,
    value_tiles: tl.tensor,
    table: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    position: tl.tensor,
    first_key: tl.tensor,
    last_key: tl.tensor,
    column: tl.tensor,
    token_stride: tl.tensor,
    window: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tl.tuple:
    """Fold the key tiles [begin, end) into the softmax of every row."""
    for tile in tl.range(begin, end, num_stages=STAGES):
        key = tile * TILE + tl.arange(0, TILE)
        near = key
        if MASKED:
            near = tl.minimum(tl.maximum(key, first_key), last_key)
        k = _load_rows(
            key_cache, key_tiles, table, tile, near, column, token_stride,
            HEAD_DIM, BLOCK_DIM, PAGE, TILE, TMA,
        )  # fmt: skip
        products = tl.dot(q, tl.trans(k.to(COMPUTE)), input_precision=PRECISION)
        scores = base2_scores(products, factor, cap, SOFT_CAP)
        if MASKED:
            visible = key[None, :] <= position[:, None]
            if WINDOW:
                visible = visible & (key[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        decay = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * decay + tl.sum(weights, 1)
        v = _load_rows(
            value_cache, value_tiles, table, tile, near, column, token_stride,
            HEAD_DIM, BLOCK_DIM, PAGE, TILE, TMA,
        )  # fmt: skip
        accumulator = tl.dot(
            weights.to(COMPUTE),
            v.to(COMPUTE),
            accumulator * decay[:, None],
            input_precision=PRECISION,
        )
        top = higher
    return top, total, accumulator


@triton.jit(do_not_specialize=["table_stride", "window", "first_sequence"])  # they vary by step
def _paged_prefill_kernel(
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    key_tiles: tl.tensor,
    value_tiles: tl.tensor,
    out: tl.tensor,
    block_tables: tl.tensor,
    query_starts: tl.tensor,
    context_lens: tl.tensor,
    work: tl.tensor,
    query_stride: tl.tensor,
    query_head_stride: tl.tensor,
    table_stride: tl.tensor,
    token_stride: tl.tensor,
    first_sequence: tl.tensor,
    window: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    value_scale: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    TMA: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:
    TOKENS: tl.constexpr = BLOCK_QUERIES // GROUP  # noqa: N806 # a constant, as Triton's are
    # Later tiles see more keys: they start first.
    entry = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(work + 2 * entry) + first_sequence
    first_token = tl.load(work + 2 * entry + 1) * TOKENS
    start = tl.load(query_starts + sequence)
    new = tl.load(query_starts + sequence + 1) - start
    before = tl.load(context_lens + sequence) - new
    row = tl.arange(0, BLOCK_QUERIES)
    token = first_token + row // GROUP
    dim = tl.arange(0, BLOCK_DIM)
    heads = tl.num_programs(1) * GROUP
    head = kv_head * GROUP + row % GROUP
    inside = (row < TOKENS * GROUP) & (token < new)
    stored = inside[:, None] & (dim < HEAD_DIM)[None, :]
    rows = query + (start + token).to(tl.int64) * query_stride + head * query_head_stride
    q = tl.load(rows[:, None] + dim[None, :], mask=stored, other=0.0).to(COMPUTE)
    position = before + token
    first_position = before + first_token
    last_key = before + tl.minimum(first_token + TOKENS, new) - 1
    first_key, cut = 0, 0
    if WINDOW:
        first_key = tl.maximum(first_position - window + 1, 0)
        cut = tl.maximum(last_key - window + 1, 0)
    begin = first_key // TILE
    end = last_key // TILE + 1
    # Tiles [full, diagonal) lie in sight of every row.
    diagonal = tl.maximum((first_position + 1) // TILE, begin)
    full = tl.minimum((cut + TILE - 1) // TILE, diagonal)
    table = block_tables + sequence.to(tl.int64) * table_stride
    column = kv_head * HEAD_DIM
    top = lowest(BLOCK_QUERIES)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    accumulator = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
    if WINDOW:
        top, total, accumulator = _attend(
            q, top, total, accumulator, key_cache, value_cache, key_tiles, value_tiles, table,
            begin, full, position, first_key, last_key, column, token_stride, window, factor, cap,
            HEAD_DIM, BLOCK_DIM, PAGE, TILE, SOFT_CAP, COMPUTE, PRECISION, EDGE_STAGES, True, False,
            WINDOW,
        )  # fmt: skip
    top, total, accumulator = _attend(
        q, top, total, accumulator, key_cache, value_cache, key_tiles, value_tiles, table,
        full, diagonal, position, first_key, last_key, column, token_stride, window, factor, cap,
        HEAD_DIM, BLOCK_DIM, PAGE, TILE, SOFT_CAP, COMPUTE, PRECISION, STAGES, False, TMA, WINDOW,
    )  # fmt: skip
    top, total, accumulator = _attend(
        q, top, total, accumulator, key_cache, value_cache, key_tiles, value_tiles, table,
        diagonal, end, position, first_key, last_key, column, token_stride, window, factor, cap,
        HEAD_DIM, BLOCK_DIM, PAGE, TILE, SOFT_CAP, COMPUTE, PRECISION, EDGE_STAGES, True, False,
        WINDOW,
    )  # fmt: skip
    # The highest score alone adds 1; only padding rows have less.
    result = accumulator * (value_scale / tl.maximum(total, 1.0))[:, None]
    places = ((start + token).to(tl.int64) * heads + head) * HEAD_DIM
    tl.store(out + places[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=stored)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the prefill kernel is compiled."""

    rows: int = 128
    """Query rows a program: tokens times query heads of a group."""
    tile: int = 128
    """Keys a tile."""
    warps: int = 8
    stages: int = 2
    edge_stages: int = 1
    """Of the loops over the tiles that the window and the diagonal cut; more costs registers."""
    tma: bool = False
    """The tensor memory accelerator copies the tiles of the main loop; pages hold whole tiles."""


def prefill_config(capability: int, head_dim: int, page: int, group: int = 1) -> PrefillConfig:
    """The choice for a GPU, a head dimension, a page size and a number of query heads a KV head."""
    rows = max(128 if head_dim <= 128 else 64, triton.next_power_of_2(group))
    if capability < 90:
        return PrefillConfig(rows, tile=64 if head_dim <= 128 else 32, edge_stages=2)
    if head_dim > 128:
        return PrefillConfig(rows, tile=64)
    whole = head_dim == triton.next_power_of_2(head_dim) and head_dim >= 16
    edge_stages = 2 if capability < 100 else 1
    return PrefillConfig(rows, 128, edge_stages=edge_stages, tma=whole and page % 128 == 0)


def paged_prefill_cuda(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    layout: AttentionLayout,
    traits: AttentionTraits,
    *,
    out: torch.Tensor,
    config: PrefillConfig | None = None,
) -> None:
    """Attend from the rows behind `layout.num_decodes`; shapes as in `paged_attention`."""
    _, page, kv_heads, head_dim = key_cache.shape
    group = traits.constants["GROUP"]
    capability = device_traits(query.device).capability
    config = config or prefill_config(capability, head_dim, page, group)
    work = _shared_work(layout, config.rows // group)
    if work is None:
        return
    key_tiles = value_tiles = None
    if config.tma:
        key_tiles = _tiles_of(key_cache, config.tile)
        value_tiles = _tiles_of(value_cache, config.tile)
    _paged_prefill_kernel[(work.shape[0] - 1, kv_heads)](
        query,
        key_cache,
        value_cache,
        key_tiles,
        value_tiles,
        out,
        layout.block_tables,
        layout.query_starts,
        layout.context_lens,
        work,
        query.stride(0),
        query.stride(1),
        layout.block_tables.stride(0),
        kv_heads * head_dim,
        layout.num_decodes,
        traits.sliding_window or 0,
        traits.factor,
        traits.cap,
        traits.value_scale,
        **traits.constants,
        BLOCK_QUERIES=config.rows,
        TILE=config.tile,
        STAGES=config.stages,
        EDGE_STAGES=config.edge_stages,
        TMA=config.tma,
        WINDOW=traits.sliding_window is not None,
        num_warps=config.warps,
    )


def _shared_work(layout: AttentionLayout, tokens: int) -> torch.Tensor | None:
    """Which tokens each program handles, made by the first layer; None if there are none."""
    programs = sum(-(-new // tokens) for new in layout.host_query_lens[layout.num_decodes :])
    if programs == 0:
        return None
    key = ("prefill", tokens)
    work = layout.derived.get(key)
    if not isinstance(work, torch.Tensor):
        starts = layout.query_starts[layout.num_decodes :]
        work = prefill_tile_map(starts, programs=programs, tile=tokens).work
        layout.derived[key] = work
    return work


def _tiles_of(cache: torch.Tensor, tile: int) -> TensorDescriptor:
    """A cache as the matrix that the accelerator copies from: a token a row."""
    rows = cache.view(-1, cache.shape[2] * cache.shape[3])
    return TensorDescriptor.from_tensor(rows, [tile, cache.shape[3]])


def aot_cases() -> list[AotCase]:
    """Llama, Qwen and Gemma shapes, gathered pages and whole tiles."""
    return [
        _prefill_case("bf16", group=4, head_dim=128, page=16, tested=(80,)),
        _prefill_case("bf16", group=4, head_dim=128, page=128, tested=(90,)),
        _prefill_case("fp16", group=2, head_dim=256, page=32, soft_cap=True, window=True),
        _prefill_case("fp8e4nv", group=7, head_dim=64, page=64),
    ]


def workloads() -> list[Workload]:
    """One layer of Llama-3.1-8B: 32 query heads on 8 KV heads of 128, causal."""
    return [
        _workload("1 x 8192", [(8192, 0)], 0.55, "wgmma, but softmax and products take turns"),
        _workload(
            "8 x 1024", [(1024, 0)] * 8, 0.4, "a quarter of the tiles are cut by the diagonal"
        ),
        _workload("4096 behind 4096", [(4096, 4096)], 0.55, "as a long prompt"),
    ]


def _workload(
    shape: str, lengths: Sequence[tuple[int, int]], share: float, because: str
) -> Workload:
    """Of (new, cached) tokens; rows see (cached + 1) to (cached + new) keys."""
    heads, kv_heads, head_dim = 32, 8, 128
    pairs = sum(new * cached + new * (new + 1) // 2 for new, cached in lengths)
    new, seen = (sum(column) for column in zip(*lengths, strict=True))
    return Workload(
        op="paged_attention (prefill)",
        kernels=("tile_map", "paged_prefill"),
        shape=shape,
        bytes=2 * (2 * new * heads + 2 * (new + seen) * kv_heads) * head_dim,
        flops=4 * pairs * heads * head_dim,
        expected_share=share,
        because=because,
    )


def _prefill_case(
    dtype: str,
    *,
    group: int,
    head_dim: int,
    page: int,
    soft_cap: bool = False,
    window: bool = False,
    tested: tuple[int, ...] = (),
) -> AotCase:
    fp8 = dtype == "fp8e4nv"
    activation = "bf16" if fp8 else dtype
    targets = (90, 100) if fp8 else (80, 90, 100)
    return AotCase(
        kernel=_paged_prefill_kernel,
        variant=f"{dtype}, group {group}, head {head_dim}, page {page}",
        signature={
            **dict.fromkeys(("query", "out"), f"*{activation}"),
            **dict.fromkeys(("key_cache", "value_cache"), f"*{dtype}"),
            **dict.fromkeys(("key_tiles", "value_tiles"), f"tensordesc<{dtype}[128, {head_dim}]>"),
            **dict.fromkeys(("block_tables", "query_starts", "context_lens", "work"), "*i32"),
            **dict.fromkeys(("query_stride", "query_head_stride", "table_stride"), "i32"),
            **dict.fromkeys(("token_stride", "first_sequence", "window"), "i32"),
            **dict.fromkeys(("factor", "cap", "value_scale"), "fp32"),
        },
        constexprs={
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_DIM": head_dim,
            "PAGE": page,
            "SOFT_CAP": soft_cap,
            "COMPUTE": tl.bfloat16 if dtype == "bf16" else tl.float16,
            "PRECISION": "tf32",
            "WINDOW": window,
        },
        divisible=(
            "query", "key_cache", "value_cache", "out", "block_tables", "query_starts",
            "context_lens", "work", "query_stride", "query_head_stride", "token_stride",
        ),
        expect={
            target: _expect(target, prefill_config(target, head_dim, page))
            for target in targets
        },
        tested=tested,
    )  # fmt: skip


def _expect(target: int, config: PrefillConfig) -> Expect:
    products = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[target]
    loads = {"tma": 2} if config.tma else {"cp.async 16B": 8, "tma": 0}
    none = {} if config.tma else {"key_tiles": None, "value_tiles": None}
    return Expect(
        instructions={products: 2, **loads},
        options={"num_warps": config.warps, "num_stages": config.stages},
        constexprs={
            "BLOCK_QUERIES": config.rows,
            "TILE": config.tile,
            "STAGES": config.stages,
            "EDGE_STAGES": config.edge_stages,
            "TMA": config.tma,
            **none,
        },
    )
