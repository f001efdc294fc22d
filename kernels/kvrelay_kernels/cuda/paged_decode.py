"""Paged attention of one query a sequence, split over its keys.

A program handles all query heads of one KV head, padded to 16 rows for the matrix units, and an equal
share of the key tiles of all sequences (`paged_tile_map`). It writes a sequence that it covers
alone straight to the output, and otherwise a partial result and the base-2 logarithm of its softmax
sum; `_merge_kernel` combines those:

    out = sum_i 2**(lse_i - lse) * out_i,   lse = log2 sum_i 2**lse_i

The bytes of K and V are the limit, about 2 operations for each, so what counts is that loads never
pause. Every tile is therefore masked alike, in one pipelined loop: the comparisons hide behind the
loads, while a loop of its own for the last tile would drain the pipeline once a sequence. Positions
outside a row's sight read the nearest visible token in place of whatever a block holds there, since
zero times NaN is NaN.

Sources: Dao et al., "Flash-Decoding", 2023 (the split); Osama et al., "Stream-K", 2023
(arXiv:2301.03598; equal shares across problem borders).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvrelay_kernels.cuda.device import device_traits
from kvrelay_kernels.cuda.launch import overlap
from kvrelay_kernels.cuda.paged_softmax import AttentionTraits, base2_scores, lowest
from kvrelay_kernels.cuda.paged_tile_map import TileMap, decode_tile_map, visible_tiles
from kvrelay_kernels.cuda.registry import AotCase, Expect, Workload
from kvrelay_kernels.layout import AttentionLayout

_BLOCK_SPLITS = 32
"""Partial results that a program of the merge loads at once."""
_BLOCK_EMPTY = 8


@triton.jit(do_not_specialize=["sequences", "table_stride", "window"])  # they vary by step
def _paged_decode_kernel(
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    out: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
    work: tl.tensor,
    query_stride: tl.tensor,
    query_head_stride: tl.tensor,
    table_stride: tl.tensor,
    token_stride: tl.tensor,
    sequences: tl.tensor,
    window: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    value_scale: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first_sequence = tl.load(work + 2 * program)
    first_tile = tl.load(work + 2 * program + 1)
    end_sequence = tl.load(work + 2 * program + 2)
    end_tile = tl.load(work + 2 * program + 3)
    group = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    keys = tl.arange(0, TILE)
    heads = tl.num_programs(0) * GROUP
    head = kv_head * GROUP + group
    stored = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    for step in tl.range(0, end_sequence - first_sequence + 1, num_stages=1):
        sequence = first_sequence + step
        context = tl.load(context_lens + sequence, mask=sequence < sequences, other=0)
        tiles = visible_tiles(context, window, TILE)
        begin = tl.where(sequence == first_sequence, first_tile, 0)
        end = tl.where(sequence == end_sequence, end_tile, tiles)
        if begin < end:
            first_key = tl.where(window > 0, tl.maximum(context - window, 0), 0)
            skipped = first_key // TILE
            rows = query + sequence.to(tl.int64) * query_stride
            q = tl.load(
                rows + head[:, None] * query_head_stride + dim[None, :], mask=stored, other=0.0
            ).to(COMPUTE)
            table = block_tables + sequence.to(tl.int64) * table_stride
            top = lowest(BLOCK_GROUP)
            total = tl.zeros((BLOCK_GROUP,), tl.float32)
            accumulator = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
            for tile in tl.range(skipped + begin, skipped + end, num_stages=STAGES):
                position = tile * TILE + keys
                visible = (position < context) & (position >= first_key)
                near = tl.minimum(tl.maximum(position, first_key), context - 1)
                if PAGE % TILE == 0:
                    page = tl.load(table + tile // (PAGE // TILE)).to(tl.int64)
                    offset = kv_head * HEAD_DIM + (near % PAGE) * token_stride
                    k_rows = key_cache + page * (PAGE * token_stride) + offset
                    v_rows = value_cache + page * (PAGE * token_stride) + offset
                else:
                    page = tl.load(table + near // PAGE).to(tl.int64)
                    offset = (page * PAGE + near % PAGE) * token_stride + kv_head * HEAD_DIM
                    k_rows = key_cache + offset
                    v_rows = value_cache + offset
                if HEAD_DIM == BLOCK_DIM:
                    k = tl.load(k_rows[:, None] + dim[None, :])
                    v = tl.load(v_rows[:, None] + dim[None, :])
                else:
                    k = tl.load(
                        k_rows[:, None] + dim[None, :], mask=(dim < HEAD_DIM)[None, :], other=0.0
                    )
                    v = tl.load(
                        v_rows[:, None] + dim[None, :], mask=(dim < HEAD_DIM)[None, :], other=0.0
                    )
                products = tl.dot(q, tl.trans(k.to(COMPUTE)), input_precision=PRECISION)
                scores = base2_scores(products, factor, cap, SOFT_CAP)
                scores = tl.where(visible[None, :], scores, float("-inf"))
                higher = tl.maximum(top, tl.max(scores, 1))
                decay = tl.exp2(top - higher)
                weights = tl.exp2(scores - higher[:, None])
                total = total * decay + tl.sum(weights, 1)
                accumulator = tl.dot(
                    weights.to(COMPUTE),
                    v.to(COMPUTE),
                    accumulator * decay[:, None],
                    input_precision=PRECISION,
                )
                top = higher
            result = accumulator * (value_scale / total)[:, None]
            if (begin == 0) & (end == tiles):
                places = (sequence.to(tl.int64) * heads + head[:, None]) * HEAD_DIM + dim[None, :]
                tl.store(out + places, result.to(out.dtype.element_ty), mask=stored)
            else:
                # Either number grows from one partial result to the next, so their sum is unique.
                slot = (program + sequence).to(tl.int64) * heads + head
                places = slot[:, None] * HEAD_DIM + dim[None, :]
                tl.store(partial_out + places, result, mask=stored)
                tl.store(partial_lse + slot, top + tl.log2(total), mask=group < GROUP)


@triton.jit(do_not_specialize=["sequences"])
def _merge_kernel(
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    out: tl.tensor,
    work: tl.tensor,
    tile_starts: tl.tensor,
    sequences: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_EMPTY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    program = tl.program_id(1)
    heads = tl.num_programs(0)
    programs = tl.num_programs(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dim = tl.arange(0, BLOCK_DIM)
    # Rows padded up to the size of a captured graph have no tokens: zeros, not what lay there.
    for base in tl.range(program, sequences, programs * BLOCK_EMPTY):
        row = base + programs * tl.arange(0, BLOCK_EMPTY)
        inside = row < sequences
        begin = tl.load(tile_starts + row, mask=inside, other=0)
        end = tl.load(tile_starts + row + 1, mask=inside, other=1)
        empty = (begin == end)[:, None] & (dim < HEAD_DIM)[None, :]
        places = (row.to(tl.int64)[:, None] * heads + head) * HEAD_DIM + dim[None, :]
        tl.store(out + places, tl.zeros((BLOCK_EMPTY, BLOCK_DIM), out.dtype.element_ty), mask=empty)
    # This program's sequence is the one that the decode program of the same number begins and
    # does not finish, if there is one: each split sequence has exactly one such program.
    begun = tl.load(work + 2 * program)
    begun_tile = tl.load(work + 2 * program + 1)
    sequence = tl.load(work + 2 * program + 2)
    left = tl.load(work + 2 * program + 3)
    if (left > 0) & ((begun < sequence) | (begun_tile == 0)):
        total = tl.load(tile_starts + sequences)
        end = tl.load(tile_starts + sequence + 1)
        # The last program whose first tile, floor(p * total / busy), is at most end - 1.
        busy = tl.minimum(programs, total)
        last = (end.to(tl.int64) * busy - 1) // total
        splits = (last - program + 1).to(tl.int32)
        top = tl.full((), -1e30, tl.float32)
        weight = tl.zeros((), tl.float32)
        accumulator = tl.zeros((BLOCK_DIM,), tl.float32)
        for base in tl.range(0, splits, BLOCK_SPLITS):
            split = base + tl.arange(0, BLOCK_SPLITS)
            slot = (program + sequence + split).to(tl.int64) * heads + head
            lse = tl.load(partial_lse + slot, mask=split < splits, other=float("-inf"))
            rows = tl.load(
                partial_out + slot[:, None] * HEAD_DIM + dim[None, :],
                mask=(split < splits)[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            )
            higher = tl.maximum(top, tl.max(lse))
            decay = tl.exp2(top - higher)
            shares = tl.exp2(lse - higher)
            weight = weight * decay + tl.sum(shares)
            accumulator = accumulator * decay + tl.sum(rows * shares[:, None], 0)
            top = higher
        places = (sequence.to(tl.int64) * heads + head) * HEAD_DIM + dim
        result = (accumulator / weight).to(out.dtype.element_ty)
        tl.store(out + places, result, mask=dim < HEAD_DIM)


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the decode kernel is compiled and how many of it run at once."""

    tile: int = 64
    """Keys a tile."""
    warps: int = 4
    stages: int = 5
    """The load of a page number takes one stage in two: five keep two tiles of K and V in flight."""
    programs_per_sm: int = 2
    registers: int = 224
    """At most so many a thread: left alone, the compiler may spill to fit a third program."""


def decode_config(head_dim: int) -> DecodeConfig:
    """The choice for a head dimension; shared memory halves the tile of the largest heads."""
    return DecodeConfig() if head_dim <= 128 else DecodeConfig(tile=32)


def paged_decode_cuda(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    layout: AttentionLayout,
    traits: AttentionTraits,
    *,
    out: torch.Tensor,
    config: DecodeConfig | None = None,
) -> None:
    """Attend from the rows `[0, layout.num_decodes)`; shapes as in `paged_attention`."""
    rows, (heads, head_dim) = layout.num_decodes, query.shape[1:]
    kv_heads = key_cache.shape[2]
    config = config or decode_config(head_dim)
    multiprocessors = device_traits(query.device).multiprocessors
    programs = max(1, multiprocessors * config.programs_per_sm // kv_heads)
    tiles = _shared_map(layout, programs, config.tile, traits.sliding_window)
    partial_out, partial_lse = _partials(layout, programs + rows, heads, head_dim)
    _paged_decode_kernel[(kv_heads, programs)](
        query,
        key_cache,
        value_cache,
        out,
        partial_out,
        partial_lse,
        layout.block_tables,
        layout.context_lens,
        tiles.work,
        query.stride(0),
        query.stride(1),
        layout.block_tables.stride(0),
        kv_heads * head_dim,
        rows,
        traits.sliding_window or 0,
        traits.factor,
        traits.cap,
        traits.value_scale,
        **traits.constants,
        BLOCK_GROUP=max(16, triton.next_power_of_2(traits.constants["GROUP"])),
        TILE=config.tile,
        STAGES=config.stages,
        num_warps=config.warps,
        maxnreg=config.registers,
        **overlap(query),
    )
    _merge_kernel[(heads, programs)](
        partial_out,
        partial_lse,
        out,
        tiles.work,
        tiles.tile_starts,
        rows,
        HEAD_DIM=head_dim,
        BLOCK_DIM=traits.constants["BLOCK_DIM"],
        BLOCK_SPLITS=_BLOCK_SPLITS,
        BLOCK_EMPTY=_BLOCK_EMPTY,
        num_warps=4,
        **overlap(query),
    )


def _shared_map(
    layout: AttentionLayout, programs: int, tile: int, sliding_window: int | None
) -> TileMap:
    """The map of this step, made by the first layer that needs it."""
    key = (TileMap, programs, tile, sliding_window)
    tiles = layout.derived.get(key)
    if not isinstance(tiles, TileMap):
        tiles = layout.derived[key] = decode_tile_map(
            layout.context_lens[: layout.num_decodes],
            programs=programs,
            tile=tile,
            sliding_window=sliding_window,
        )
    return tiles


def _partials(
    layout: AttentionLayout, slots: int, heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the partial results of one layer, the same for all layers of a step."""
    shape = (slots, heads, head_dim + 1)
    room = layout.derived.get(shape)
    if not isinstance(room, torch.Tensor):
        size = slots * heads * (head_dim + 1)
        room = torch.empty(size, dtype=torch.float32, device=layout.context_lens.device)
        layout.derived[shape] = room
    count = slots * heads * head_dim
    return room[:count], room[count:]


def aot_cases() -> list[AotCase]:
    """Llama, Qwen and Gemma shapes, small and large pages, both widths of cache."""
    return [
        _decode_case("bf16", group=4, head_dim=128, page=16, blocks=2, tested=(90,)),
        _decode_case("bf16", group=7, head_dim=64, page=128, blocks=3),
        _decode_case("fp16", group=2, head_dim=256, page=32, blocks=1, soft_cap=True),
        _decode_case("fp8e4nv", group=8, head_dim=128, page=64, blocks=2, tested=(100,)),
        _merge_case(),
    ]


def workloads() -> list[Workload]:
    """One layer of Llama-3.1-8B: 32 query heads on 8 KV heads of 128."""
    return [
        _workload("1 x 1024", [1024], 0.85, "4 MB: two launches and a merge outlast the loads"),
        _workload(
            "1 x 32768", [32768], 0.85, "134 MB, two tiles in flight in each of 264 programs"
        ),
        _workload(
            "32 x 4096", [4096] * 32, 0.85, "uniform: the same, 8 segments a program at most"
        ),
        _workload(
            "1 x 131072 + 31 x 4096",
            [131072] + [4096] * 31,
            0.82,
            "equal shares of tiles: as uniform, but for the merge of the long one",
        ),
        _workload(
            "256 x 1024", [1024] * 256, 0.75, "a pipeline fills anew for each of 8 sequences"
        ),
        _workload(
            "32 x 4096", [4096] * 32, 0.7, "the same with half the bytes: conversions show", 1
        ),
        _merge_workload("32 x 4096", [4096] * 32),
        _merge_workload("1 x 131072 + 31 x 4096", [131072] + [4096] * 31),
    ]


def _workload(
    shape: str, contexts: Sequence[int], share: float, because: str, itemsize: int = 2
) -> Workload:
    heads, kv_heads, head_dim = 32, 8, 128
    tokens = sum(contexts)
    activations = 2 * 2 * len(contexts) * heads * head_dim
    return Workload(
        op="paged_attention (decode)",
        kernels=("paged_decode", "merge"),
        shape=shape,
        bytes=2 * tokens * kv_heads * head_dim * itemsize + activations,
        flops=4 * tokens * heads * head_dim,
        expected_share=share,
        because=because,
        dtype="bfloat16" if itemsize == 2 else "float8_e4m3fn cache",
        latency_us=4.0,
    )


def _merge_workload(shape: str, contexts: Sequence[int]) -> Workload:
    """The merge alone, after 33 programs for each KV head; its time is in the rows of the whole, too."""
    heads, head_dim, programs = 32, 128, 33
    tile = decode_config(head_dim).tile
    ends = list(accumulate(triton.cdiv(context, tile) for context in contexts))
    cuts = {ends[-1] * program // programs for program in range(1, programs)} - set(ends)
    split = {bisect_right(ends, cut) for cut in cuts}
    partials = (len(cuts) + len(split)) * heads
    return Workload(
        op="paged_attention (merge)",
        kernels=("merge",),
        shape=shape,
        bytes=4 * partials * (head_dim + 1) + 2 * len(split) * heads * head_dim,
        flops=2 * partials * head_dim,
        expected_share=0.5,
        because="partial results from the L2 cache; the map, then the partials: two loads deep",
        dtype="float32",
        latency_us=2.5,
    )


def _decode_case(
    dtype: str,
    *,
    group: int,
    head_dim: int,
    page: int,
    blocks: int,
    soft_cap: bool = False,
    tested: tuple[int, ...] = (),
) -> AotCase:
    config = decode_config(head_dim)
    fp8 = dtype == "fp8e4nv"
    activation = "bf16" if fp8 else dtype
    expect = Expect(instructions={"mma.sync": 8, "cp.async 16B": 8}, blocks_per_sm=blocks)
    hopper = Expect(
        instructions={**expect.instructions, "griddepcontrol": 2}, blocks_per_sm=blocks,
        constexprs={"PDL": True}, options={"launch_pdl": True},
    )  # fmt: skip
    return AotCase(
        kernel=_paged_decode_kernel,
        variant=f"{dtype}, group {group}, head {head_dim}, page {page}",
        signature={
            **dict.fromkeys(("query", "out"), f"*{activation}"),
            **dict.fromkeys(("key_cache", "value_cache"), f"*{dtype}"),
            **dict.fromkeys(("partial_out", "partial_lse"), "*fp32"),
            **dict.fromkeys(("block_tables", "context_lens", "work"), "*i32"),
            **dict.fromkeys(("query_stride", "query_head_stride", "table_stride"), "i32"),
            **dict.fromkeys(("token_stride", "sequences", "window"), "i32"),
            **dict.fromkeys(("factor", "cap", "value_scale"), "fp32"),
        },
        constexprs={
            "GROUP": group,
            "BLOCK_GROUP": 16,
            "HEAD_DIM": head_dim,
            "BLOCK_DIM": head_dim,
            "PAGE": page,
            "TILE": config.tile,
            "SOFT_CAP": soft_cap,
            "COMPUTE": tl.bfloat16 if dtype == "bf16" else tl.float16,
            "PRECISION": "tf32",
            "STAGES": config.stages,
            "PDL": False,
        },
        divisible=(
            "query", "key_cache", "value_cache", "out", "partial_out", "partial_lse", "block_tables",
            "context_lens", "work", "query_stride", "query_head_stride", "token_stride",
        ),
        options={"num_warps": config.warps, "maxnreg": config.registers},
        expect={100: hopper, 90: hopper} if fp8 else {80: expect, 90: hopper, 100: hopper},
        tested=tested,
    )  # fmt: skip


def _merge_case() -> AotCase:
    pdl = {"constexprs": {"PDL": True}, "options": {"launch_pdl": True}}
    loads = {"ld.global 16B": 1}
    return AotCase(
        kernel=_merge_kernel,
        variant="bf16, head 128",
        signature={
            **dict.fromkeys(("partial_out", "partial_lse"), "*fp32"),
            "out": "*bf16",
            **dict.fromkeys(("work", "tile_starts"), "*i32"),
            "sequences": "i32",
        },
        constexprs={
            "HEAD_DIM": 128,
            "BLOCK_DIM": 128,
            "BLOCK_SPLITS": _BLOCK_SPLITS,
            "BLOCK_EMPTY": _BLOCK_EMPTY,
            "PDL": False,
        },
        divisible=("partial_out", "out", "work", "tile_starts"),
        options={"num_warps": 4},
        expect={
            80: Expect(instructions=loads, blocks_per_sm=8),
            90: Expect(instructions={**loads, "griddepcontrol": 2}, blocks_per_sm=8, **pdl),
            100: Expect(instructions={**loads, "griddepcontrol": 2}, blocks_per_sm=8, **pdl),
        },
    )
