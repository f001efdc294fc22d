"""Sampling in Triton: the same weights, thresholds and tokens as reference/sampling.py, bit by bit.

```
tile maxima  [rows, tiles]     one program a tile of 2048 logits
weights      [rows, tiles]     one program a tile; also the sum and the largest weight of each tile
draw         [rows]            one program a row: thresholds, then the inverse of the running sum
```

A threshold is found from the logarithm of the weights, the bits of the weight as a float64: 10 and then
four times 9 of them select one bin of a histogram. After the first digit only tiles whose largest
weight reaches the selected bin are read again.

Compiled without fused multiply-add: the weights are defined by operations rounded one by one.
"""

import torch
import triton
import triton.language as tl

from kvrelay_kernels.cuda.registry import TARGETS, AotCase, Expect, Workload
from kvrelay_kernels.reference.sampling import (
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    SCALE,
    SMALLEST_EXPONENT,
    TAYLOR,
    TokenLogprobs,
    most_likely,
)

TILE = 2048
BINS = 1024
_SCRATCH_BYTES = 256 << 20
"""Rows are drawn in groups whose weights fit this, so that a large batch needs no more."""

_LOG2_E = tl.constexpr(LOG2_E)
_LN2_HIGH = tl.constexpr(LN2_HIGH)
_LN2_LOW = tl.constexpr(LN2_LOW)
_SCALE = tl.constexpr(SCALE)
_SMALLEST = tl.constexpr(SMALLEST_EXPONENT)
_TAYLOR = tl.constexpr(TAYLOR)
_ONE_BITS = tl.constexpr(1023 << 52)
_SPARE_BITS = tl.constexpr(12)
"""Weights have at most 40 bits below the leading one, a float64 has 52."""


@triton.jit
def _tile_max_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    tile_max: tl.tensor,
    tile_arg: tl.tensor,
    TILE: tl.constexpr,
    WITH_ARG: tl.constexpr,
) -> None:
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < vocabulary
    values = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    best = tl.max(values, axis=0)
    place = row * tl.num_programs(1) + tile
    tl.store(tile_max + place, best)
    if WITH_ARG:
        hit = inside & (values == best)
        tl.store(tile_arg + place, tl.min(tl.where(hit, at, vocabulary - 1), axis=0))


@triton.jit
def _greedy_kernel(
    tile_max: tl.tensor,
    tile_arg: tl.tensor,
    tiles: tl.tensor,
    tokens: tl.tensor,
    TILES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, TILES)
    inside = at < tiles
    best = tl.load(tile_max + row * tiles + at, mask=inside, other=float("-inf"))
    ids = tl.load(tile_arg + row * tiles + at, mask=inside, other=2147483647)
    first = tl.min(tl.where(best == tl.max(best, axis=0), ids, 2147483647), axis=0)
    tl.store(tokens + row, first.to(tl.int64))


@triton.jit
def _integer_weight(
    exponent: tl.tensor,
) -> tl.tensor:
    """`integer_weights` of the reference, of exponents that are at most zero."""
    exponent = tl.maximum(exponent, _SMALLEST)
    halvings = tl.floor(exponent * _LOG2_E + 0.5)
    reduced = exponent - halvings * _LN2_HIGH - halvings * _LN2_LOW
    result = tl.full(exponent.shape, _TAYLOR[0], tl.float64)
    for i in tl.static_range(1, 14):
        result = result * reduced + _TAYLOR[i]
    power = ((halvings.to(tl.int64) + (1023 + 40)) << 52).to(tl.float64, bitcast=True)
    return (result * power).to(tl.int64)


@triton.jit
def _weights_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    tile_max: tl.tensor,
    temperature: tl.tensor,
    weights: tl.tensor,
    tile_sum: tl.tensor,
    tile_top: tl.tensor,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tiles = tl.num_programs(1)
    all_tiles = tl.arange(0, TILES)
    maxima = tl.load(
        tile_max + row * tiles + all_tiles, mask=all_tiles < tiles, other=float("-inf")
    )
    top = tl.max(maxima, axis=0).to(tl.float64)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < vocabulary
    values = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")).to(tl.float64)
    found = _integer_weight((values - top) / tl.load(temperature + row))
    found = tl.where(inside, found, 0)
    tl.store(weights + row * vocabulary + at, found, mask=inside)
    tl.store(tile_sum + row * tiles + tile, tl.sum(found, axis=0))
    tl.store(tile_top + row * tiles + tile, tl.max(found, axis=0))


@triton.jit
def _ceil_to_int(
    value: tl.tensor,
) -> tl.tensor:
    below = value.to(tl.int64)
    return below + (below.to(tl.float64) < value).to(tl.int64)


@triton.jit
def _logarithm_bits(
    weight: tl.tensor,
) -> tl.tensor:
    """46 bits that grow with the weight, which is above zero: exponent, then mantissa."""
    return (weight.to(tl.float64).to(tl.int64, bitcast=True) - _ONE_BITS) >> _SPARE_BITS


@triton.jit
def _from_logarithm_bits(
    bits: tl.tensor,
) -> tl.tensor:
    return ((bits << _SPARE_BITS) + _ONE_BITS).to(tl.float64, bitcast=True).to(tl.int64)


@triton.jit
def _add_to_histogram(
    histogram: tl.tensor,
    weights: tl.tensor,
    vocabulary: tl.tensor,
    tile: tl.tensor,
    prefix: tl.tensor,
    shift: tl.tensor,
    width: tl.tensor,
    BY_MASS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    at = tile * TILE + tl.arange(0, TILE)
    weight = tl.load(weights + at, mask=at < vocabulary, other=0)
    bits = _logarithm_bits(weight)
    counted = (weight > 0) & ((bits >> (shift + width)) == prefix)
    # The largest weights come first, so that a running sum goes from the top.
    largest = (1 << width) - 1
    place = largest - ((bits >> shift) & largest)
    value = weight if BY_MASS else weight * 0 + 1
    tl.atomic_add(histogram + place, value, mask=counted, sem="relaxed")


@triton.jit
def _find_threshold(
    histogram: tl.tensor,
    weights: tl.tensor,
    tile_top: tl.tensor,
    vocabulary: tl.tensor,
    tiles: tl.tensor,
    needed: tl.tensor,
    BY_MASS: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
) -> tl.tensor:
    """The largest t for which the weights >= t (or their number) sum to `needed`; 0 if all do not."""
    bins = tl.arange(0, BINS)
    prefix = needed * 0
    enough = prefix
    shift = 46
    for level in range(5):
        width = 9 + tl.where(level == 0, 1, 0)
        shift -= width
        tl.store(histogram + bins, tl.zeros([BINS], tl.int64))
        tl.debug_barrier()
        # What the bin that is already selected starts at; nothing below is counted any more.
        lowest = _from_logarithm_bits(prefix << (shift + width))
        for tile in range(tiles):
            if tl.load(tile_top + tile) >= lowest:
                _add_to_histogram(
                    histogram, weights, vocabulary, tile, prefix, shift, width, BY_MASS, TILE
                )
        tl.debug_barrier()
        sums = tl.load(histogram + bins, cache_modifier=".cg")
        running = tl.cumsum(sums, axis=0)
        before = running < needed
        if level == 0:
            enough = (tl.sum(sums, axis=0) >= needed).to(tl.int64)
        place = tl.sum(before.to(tl.int64), axis=0)
        largest = (1 << width) - 1
        needed -= tl.sum(tl.where(before, sums, 0), axis=0)
        prefix = (prefix << width) | (largest - tl.minimum(place, largest))
        tl.debug_barrier()
    return enough * _from_logarithm_bits(prefix)


@triton.jit
def _sum_tiles(
    weights: tl.tensor,
    tile_sum: tl.tensor,
    tile_top: tl.tensor,
    vocabulary: tl.tensor,
    tiles: tl.tensor,
    limit: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Store each tile's sum of the weights >= limit and return the sum of them all."""
    total = limit * 0
    for tile in range(tiles):
        kept = limit * 0
        if tl.load(tile_top + tile) >= limit:
            at = tile * TILE + tl.arange(0, TILE)
            weight = tl.load(weights + at, mask=at < vocabulary, other=0)
            kept = tl.sum(tl.where(weight >= limit, weight, 0), axis=0)
        tl.store(tile_sum + tile, kept)
        total += kept
    tl.debug_barrier()
    return total


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
        limit = _find_threshold(
            histogram, weights, tile_top, vocabulary, tiles, k, False, TILE, BINS
        )
    if p < 1.0:
        kept = _sum_tiles(weights, tile_sum, tile_top, vocabulary, tiles, limit, TILE)
        needed = tl.minimum(_ceil_to_int(p * kept.to(tl.float64)), kept)
        by_mass = _find_threshold(
            histogram, weights, tile_top, vocabulary, tiles, needed, True, TILE, BINS
        )
        limit = tl.maximum(limit, by_mass)
    limit = tl.maximum(limit, least)
    if limit > 0:
        _sum_tiles(weights, tile_sum, tile_top, vocabulary, tiles, limit, TILE)

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


@triton.jit
def _penalties_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    token_ids: tl.tensor,
    pair_rows: tl.tensor,
    output_counts: tl.tensor,
    presence: tl.tensor,
    frequency: tl.tensor,
    repetition: tl.tensor,
    pairs: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    row = tl.load(pair_rows + pair, mask=inside, other=0)
    place = logits + row * stride + tl.load(token_ids + pair, mask=inside, other=0)
    count = tl.load(output_counts + pair, mask=inside, other=0)
    factor = tl.load(repetition + row, mask=inside, other=1.0)
    value = tl.load(place, mask=inside, other=0.0)
    value = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
    often = tl.load(frequency + row, mask=inside, other=0.0) * count.to(tl.float32)
    once = tl.load(presence + row, mask=inside, other=0.0) * (count > 0).to(tl.float32)
    tl.store(place, value - (often + once), mask=inside)


@triton.jit
def _logprobs_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    tokens: tl.tensor,
    logprob: tl.tensor,
    normaliser: tl.tensor,
    rank: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    chosen = tl.load(logits + tl.load(tokens + row)).to(tl.float32)
    lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    at_least = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, vocabulary, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < vocabulary
        value = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        at_least += (inside & (value >= chosen)).to(tl.int32)
        higher = tl.maximum(lane_max, value)
        # Minus infinity minus itself is no number: such lanes have nothing to add yet.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        lane_sum = lane_sum * tl.exp(lane_max - base) + tl.exp(value - base)
        lane_max = higher
    top = tl.max(lane_max, axis=0)
    total = tl.sum(lane_sum * tl.exp(lane_max - top), axis=0)
    log_total = top + tl.log(total)
    tl.store(logprob + row, chosen - log_total)
    tl.store(normaliser + row, log_total)
    tl.store(rank + row, tl.sum(at_least, axis=0).to(tl.int64))


def _tiles(vocabulary: int) -> tuple[int, int]:
    tiles = triton.cdiv(vocabulary, TILE)
    return tiles, triton.next_power_of_2(tiles)


def _rows_contiguous(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def greedy_cuda(logits: torch.Tensor) -> torch.Tensor:
    """`kvrelay_kernels.sampling.greedy` on a GPU."""
    logits = _rows_contiguous(logits)
    rows, vocabulary = logits.shape
    tiles, padded = _tiles(vocabulary)
    tile_max = torch.empty((rows, tiles), dtype=torch.float32, device=logits.device)
    tile_arg = torch.empty((rows, tiles), dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _tile_max_kernel[rows, tiles](
            logits, logits.stride(0), vocabulary, tile_max, tile_arg, TILE=TILE, WITH_ARG=True
        )
        _greedy_kernel[(rows,)](tile_max, tile_arg, tiles, tokens, TILES=padded)
    return tokens


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
    logits = _rows_contiguous(logits)
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    step = max(1, _SCRATCH_BYTES // (8 * vocabulary))
    for first in range(0, rows, step):
        group = slice(first, min(first + step, rows))
        weights, tile_sum, tile_top = integer_weights_cuda(logits[group], temperature[group])
        count, tiles = tile_sum.shape
        _draw_kernel[(count,)](
            weights,
            tile_sum,
            tile_top,
            torch.empty((count, BINS), dtype=torch.int64, device=logits.device),
            vocabulary,
            tiles,
            top_k[group],
            top_p[group],
            min_p[group],
            uniform[group],
            tokens[group],
            TILE=TILE,
            TILES=triton.next_power_of_2(tiles),
            BINS=BINS,
            num_warps=16,
            enable_fp_fusion=False,
        )
    return tokens


def integer_weights_cuda(
    logits: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integer weights, `[rows, vocabulary]`, and their sums and maxima, `[rows, tiles]`; all int64."""
    rows, vocabulary = logits.shape
    tiles, padded = _tiles(vocabulary)
    device = logits.device
    tile_max = torch.empty((rows, tiles), dtype=torch.float32, device=device)
    weights = torch.empty((rows, vocabulary), dtype=torch.int64, device=device)
    tile_sum = torch.empty((rows, tiles), dtype=torch.int64, device=device)
    tile_top = torch.empty_like(tile_sum)
    _tile_max_kernel[rows, tiles](
        logits, logits.stride(0), vocabulary, tile_max, None, TILE=TILE, WITH_ARG=False
    )
    _weights_kernel[rows, tiles](
        logits,
        logits.stride(0),
        vocabulary,
        tile_max,
        temperature,
        weights,
        tile_sum,
        tile_top,
        TILE=TILE,
        TILES=padded,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return weights, tile_sum, tile_top


def uniforms_cuda(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`kvrelay_kernels.sampling.uniforms` on a GPU."""
    rows = seeds.shape[0]
    out = torch.empty(rows, dtype=torch.float64, device=seeds.device)
    if rows:
        _uniforms_kernel[(triton.cdiv(rows, 128),)](
            seeds.contiguous(), positions.contiguous(), out, rows, BLOCK=128
        )
    return out


def apply_penalties_cuda(
    logits: torch.Tensor,
    *,
    token_ids: torch.Tensor,
    pair_rows: torch.Tensor,
    output_counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """`kvrelay_kernels.sampling.apply_penalties` on a GPU; rows contiguous."""
    pairs = token_ids.shape[0]
    if not pairs:
        return
    if logits.stride(1) != 1:
        raise ValueError("the rows of logits must be contiguous")
    _penalties_kernel[(triton.cdiv(pairs, 256),)](
        logits,
        logits.stride(0),
        token_ids.contiguous(),
        pair_rows.contiguous(),
        output_counts.contiguous(),
        presence.contiguous(),
        frequency.contiguous(),
        repetition.contiguous(),
        pairs,
        BLOCK=256,
        enable_fp_fusion=False,
    )


def token_logprobs_cuda(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> TokenLogprobs:
    """`kvrelay_kernels.sampling.token_logprobs` on a GPU."""
    logits = _rows_contiguous(logits)
    rows, vocabulary = logits.shape
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    normaliser = torch.empty_like(logprob)
    rank = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _logprobs_kernel[(rows,)](
            logits,
            logits.stride(0),
            vocabulary,
            tokens.contiguous(),
            logprob,
            normaliser,
            rank,
            BLOCK=4096,
            num_warps=8,
        )
    top_ids = most_likely(logits, top)
    top_logprobs = logits.gather(1, top_ids).float() - normaliser.unsqueeze(1)
    return TokenLogprobs(logprob, rank, top_ids, top_logprobs)


_VOCABULARY = 128256
_ALL_TARGETS = dict.fromkeys(TARGETS, Expect())
_VECTORS = dict.fromkeys(TARGETS, Expect(instructions={"ld.global 16B": 1}))
_SHAPE = {"stride": "i64", "vocabulary": "i32"}
_ALIGNED = ("stride", "vocabulary")


def aot_cases() -> list[AotCase]:
    """The kernels at the vocabulary of Llama 3, with float32 and bfloat16 logits."""
    tiles = _tiles(_VOCABULARY)[1]
    no_fusion = {"enable_fp_fusion": False}
    cases = []
    for name, pointer in (("float32", "*fp32"), ("bfloat16", "*bf16")):
        cases += [
            AotCase(
                kernel=_tile_max_kernel,
                variant=f"{name}, for {use}",
                signature={"logits": pointer, **_SHAPE, "tile_max": "*fp32", **arg},
                constexprs={"TILE": TILE, "WITH_ARG": bool(arg), **absent},
                divisible=("logits", *_ALIGNED),
                options={},
                expect=_VECTORS,
            )
            for use, arg, absent in (
                ("greedy", {"tile_arg": "*i32"}, {}),
                ("sample", {}, {"tile_arg": None}),
            )
        ]
        cases += [
            AotCase(
                kernel=_weights_kernel,
                variant=name,
                signature={
                    "logits": pointer,
                    **_SHAPE,
                    "tile_max": "*fp32",
                    "temperature": "*fp64",
                    "weights": "*i64",
                    "tile_sum": "*i64",
                    "tile_top": "*i64",
                },
                constexprs={"TILE": TILE, "TILES": tiles},
                divisible=("logits", "weights", "tile_max", *_ALIGNED),
                options={"num_warps": 8, **no_fusion},
                expect=dict.fromkeys(
                    TARGETS,
                    Expect(instructions={"ld.global 16B": 1, "st.global 16B": 1, "fma.f64": 0}),
                ),
            ),
            AotCase(
                kernel=_logprobs_kernel,
                variant=name,
                signature={
                    "logits": pointer,
                    **_SHAPE,
                    "tokens": "*i64",
                    "logprob": "*fp32",
                    "normaliser": "*fp32",
                    "rank": "*i64",
                },
                constexprs={"BLOCK": 4096},
                divisible=("logits", *_ALIGNED),
                options={"num_warps": 8},
                expect=_VECTORS,
            ),
        ]
    return [
        *cases,
        AotCase(
            kernel=_greedy_kernel,
            variant="",
            signature={
                "tile_max": "*fp32",
                "tile_arg": "*i32",
                "tiles": "i32",
                "tokens": "*i64",
            },
            constexprs={"TILES": tiles},
            divisible=("tile_max", "tile_arg"),
            options={},
            expect=_ALL_TARGETS,
        ),
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
            constexprs={"TILE": TILE, "TILES": tiles, "BINS": BINS},
            divisible=("weights", "tile_sum", "tile_top", "histogram", "vocabulary"),
            options={"num_warps": 16, **no_fusion},
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
            expect=_ALL_TARGETS,
        ),
        AotCase(
            kernel=_penalties_kernel,
            variant="",
            signature={
                "logits": "*fp32",
                "stride": "i64",
                "token_ids": "*i64",
                "pair_rows": "*i64",
                "output_counts": "*i32",
                **dict.fromkeys(("presence", "frequency", "repetition"), "*fp32"),
                "pairs": "i32",
            },
            constexprs={"BLOCK": 256},
            divisible=("logits", "token_ids", "pair_rows", "output_counts"),
            options=no_fusion,
            expect=_ALL_TARGETS,
        ),
    ]


def workloads() -> list[Workload]:
    """Decode batches over a Llama 3 vocabulary."""
    vocabulary = 128256
    every = [
        (rows, op, passes, share, because)
        for rows in (1, 256)
        for op, passes, share, because in (
            ("greedy", 1, 0.7, "one read of the logits; a row is cut into tiles to fill the GPU"),
            # Logits once; integer weights of 8 bytes are written, then read for the threshold and
            # for the draw.
            ("sample", 1 + 3 * 2, 0.5, "the weights are read twice and the histogram is atomic"),
            ("token_logprobs", 2, 0.6, "one read for the sum, one for rank and the largest"),
        )
    ]
    return [
        Workload(
            op=op,
            shape=f"{rows} x {vocabulary}",
            bytes=passes * rows * vocabulary * 4,
            flops=8 * rows * vocabulary,
            expected_share=share if rows > 1 else 0.1,
            because=because if rows > 1 else "half a megabyte: the launches outlast the loads",
            dtype="float32",
        )
        for rows, op, passes, share, because in every
    ]
