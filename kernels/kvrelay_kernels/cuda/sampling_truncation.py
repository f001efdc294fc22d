"""Where top-k and top-p cut a row of integer weights; part of the draw's program.

A threshold is found from the logarithm of the weights, the bits of the weight as a float64: 10 and then
four times 9 of them select one bin of a histogram. After the first digit only tiles whose largest
weight reaches the selected bin are read again.
"""

import triton
import triton.language as tl

BINS = 1024
"""Of a row's histogram: the first digit has 10 bits."""

_ONE_BITS = tl.constexpr(1023 << 52)
_SPARE_BITS = tl.constexpr(12)
"""Weights have at most 40 bits below the leading one, a float64 has 52."""


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
def find_threshold(
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
def sum_tiles(
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
