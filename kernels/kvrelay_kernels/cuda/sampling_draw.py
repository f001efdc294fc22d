"""Drawing tokens in Triton: the same thresholds and tokens as reference/sampling.py, bit by bit.

```
tile maxima  [rows, tiles]     sampling_tiles: one program a tile of 2048 logits
weights      [rows, tiles]     sampling_weights: also the sum and the largest weight of each tile
draw         [rows]            one program a row: thresholds, then the inverse of the running sum
```
"""

import torch
import triton
import triton.language as tl

from kvrelay_kernels.cuda.registry import TARGETS, AotCase, Expect, Workload
from kvrelay_kernels.cuda.sampling_tiles import (
    TILE,
    VOCABULARY,
    logits_workload,
    rows_contiguous,
    tiling,
)
from kvrelay_kernels.cuda.sampling_truncation import BINS, find_threshold, sum_tiles
from kvrelay_kernels.cuda.sampling_weights import integer_weights_cuda
from kvrelay_kernels.reference.sampling import SCALE

SCRATCH_BYTES = 256 << 20
"""Rows are drawn in groups whose weights fit this, so that a large batch needs no more."""

_SCALE = tl.constexpr(SCALE)


@triton.jit
def _ceil_to_int(
    value: tl.tensor,
) -> tl.tensor:
    below = value.to(tl.int64)
    return below + (below.to(tl.float64) < value).to(tl.int64)


@triton.jit
def _draw_kernel(
    weights: tl.tensor,
    tile_sum: tl.tensor,
    tile_top: tl.tensor,
    histogram: tl.tensor,
    vocabulary: tl.tensor,
    tiles: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    uniform: tl.tensor,
    tokens: tl.tensor,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BINS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    weights += row * vocabulary
    tile_sum += row * tiles
    tile_top += row * tiles
    histogram += row * BINS
    all_tiles = tl.arange(0, TILES)
    inside = all_tiles < tiles

    k, p = tl.load(top_k + row), tl.load(top_p + row)
    least = _ceil_to_int(tl.load(min_p + row) * _SCALE)
    limit = k * 0
    if (k > 0) & (k < vocabulary):
        limit = find_threshold(
            histogram, weights, tile_top, vocabulary, tiles, k, False, TILE, BINS
        )
    if p < 1.0:
        kept = sum_tiles(weights, tile_sum, tile_top, vocabulary, tiles, limit, TILE)
        needed = tl.minimum(_ceil_to_int(p * kept.to(tl.float64)), kept)
        by_mass = find_threshold(
            histogram, weights, tile_top, vocabulary, tiles, needed, True, TILE, BINS
        )
        limit = tl.maximum(limit, by_mass)
    limit = tl.maximum(limit, least)
    if limit > 0:
        sum_tiles(weights, tile_sum, tile_top, vocabulary, tiles, limit, TILE)

    sums = tl.load(tile_sum + all_tiles, mask=inside, other=0, cache_modifier=".cg")
    total = tl.sum(sums, axis=0)
    # Rounding of the product must not reach the total.
    target = tl.minimum((tl.load(uniform + row) * total.to(tl.float64)).to(tl.int64), total - 1)
    passed = inside & (tl.cumsum(sums, axis=0) <= target)
    tile = tl.minimum(tl.sum(passed.to(tl.int32), axis=0), tiles - 1)
    target -= tl.sum(tl.where(passed, sums, 0), axis=0)
    at = tile * TILE + tl.arange(0, TILE)
    weight = tl.load(weights + at, mask=at < vocabulary, other=0)
    running = tl.cumsum(tl.where(weight >= limit, weight, 0), axis=0)
    token = tile * TILE + tl.sum((running <= target).to(tl.int32), axis=0)
    tl.store(tokens + row, tl.minimum(token, vocabulary - 1).to(tl.int64))


@triton.jit
def _uniforms_kernel(
    seeds: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows
    seed = tl.load(seeds + at, mask=inside, other=0).to(tl.uint64, bitcast=True)
    position = tl.load(positions + at, mask=inside, other=0).to(tl.uint64, bitcast=True)
    zero = tl.zeros([BLOCK], tl.uint32)
    low, high, _, _ = tl.philox_impl(
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
        zero,
        zero,
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    bits = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> 11
    tl.store(out + at, bits.to(tl.int64).to(tl.float64) * (2.0**-53), mask=inside)


def sample_cuda(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """`kvrelay_kernels.sampling.sample` on a GPU."""
    logits = rows_contiguous(logits)
    rows, vocabulary = logits.shape
    cut = tiling(vocabulary)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    step = max(1, SCRATCH_BYTES // (8 * vocabulary))
    for first in range(0, rows, step):
        group = slice(first, min(first + step, rows))
        weights, tile_sum, tile_top = integer_weights_cuda(logits[group], temperature[group])
        count = weights.shape[0]
        _draw_kernel[(count,)](
            weights,
            tile_sum,
            tile_top,
            torch.empty((count, BINS), dtype=torch.int64, device=logits.device),
            vocabulary,
            cut.count,
            top_k[group],
            top_p[group],
            min_p[group],
            uniform[group],
            tokens[group],
            TILE=cut.tile,
            TILES=cut.padded,
            BINS=BINS,
            num_warps=16,
            enable_fp_fusion=False,
        )
    return tokens


def uniforms_cuda(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`kvrelay_kernels.sampling.uniforms` on a GPU."""
    rows = seeds.shape[0]
    out = torch.empty(rows, dtype=torch.float64, device=seeds.device)
    if rows:
        _uniforms_kernel[(triton.cdiv(rows, 128),)](
            seeds.contiguous(), positions.contiguous(), out, rows, BLOCK=128
        )
    return out


def aot_cases() -> list[AotCase]:
    """The draw over a Llama 3 vocabulary, and the numbers it takes."""
    return [
        AotCase(
            kernel=_draw_kernel,
            variant="",
            signature={
                **dict.fromkeys(("weights", "tile_sum", "tile_top", "histogram"), "*i64"),
                "vocabulary": "i32",
                "tiles": "i32",
                "top_k": "*i64",
                **dict.fromkeys(("top_p", "min_p", "uniform"), "*fp64"),
                "tokens": "*i64",
            },
            constexprs={"TILE": TILE, "TILES": tiling(VOCABULARY).padded, "BINS": BINS},
            divisible=("weights", "tile_sum", "tile_top", "histogram", "vocabulary"),
            options={"num_warps": 16, "enable_fp_fusion": False},
            expect=dict.fromkeys(
                TARGETS, Expect(instructions={"ld.global 16B": 1, "fma.f64": 0}, blocks_per_sm=2)
            ),
        ),
        AotCase(
            kernel=_uniforms_kernel,
            variant="",
            signature={"seeds": "*i64", "positions": "*i64", "out": "*fp64", "rows": "i32"},
            constexprs={"BLOCK": 128},
            divisible=("seeds", "positions", "out"),
            options={},
        ),
    ]


def workloads() -> list[Workload]:
    """Decode batches over a Llama 3 vocabulary."""
    # Logits once; integer weights of 8 bytes are written, then read for the threshold and for
    # the draw.
    sizes = (
        (1, "one program walks 63 tiles for a threshold, a load and an atomic deep each"),
        (256, "the weights are read twice and the histogram is atomic"),
    )
    return [
        *(
            logits_workload(
                "sample",
                ("tile_max", "weights", "draw"),
                rows=rows,
                passes=1 + 3 * 2,
                share=0.5,
                because=because,
                latency_us=100.0,
            )
            for rows, because in sizes
        ),
        Workload(
            op="uniforms",
            kernels=("uniforms",),
            shape="256 rows",
            # Seed and position in, a float64 out; ten rounds of two products and four additions.
            bytes=24 * 256,
            flops=80 * 256,
            expected_share=0.5,
            because="6 KB: nothing but its launch",
            dtype="float64",
        ),
    ]
