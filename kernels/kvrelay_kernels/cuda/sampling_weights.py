"""The integer weights of sampling in Triton: those of reference/sampling.py, bit by bit.

Compiled without fused multiply-add: the weights are defined by operations rounded one by one.
"""

import torch
import triton
import triton.language as tl

from kvrelay_kernels.cuda.registry import TARGETS, AotCase, Expect
from kvrelay_kernels.cuda.sampling_tiles import (
    LOGITS,
    POINTERS,
    TILE,
    VOCABULARY,
    tile_maxima,
    tiling,
)
from kvrelay_kernels.reference.sampling import (
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    SMALLEST_EXPONENT,
    TAYLOR,
)

_LOG2_E = tl.constexpr(LOG2_E)
_LN2_HIGH = tl.constexpr(LN2_HIGH)
_LN2_LOW = tl.constexpr(LN2_LOW)
_SMALLEST = tl.constexpr(SMALLEST_EXPONENT)
_TAYLOR = tl.constexpr(TAYLOR)


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


def integer_weights_cuda(
    logits: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integer weights, `[rows, vocabulary]`, and their sums and maxima, `[rows, tiles]`; all int64."""
    rows, vocabulary = logits.shape
    cut = tiling(vocabulary)
    tile_max, _ = tile_maxima(logits, cut, with_arg=False)
    weights = torch.empty((rows, vocabulary), dtype=torch.int64, device=logits.device)
    tile_sum = torch.empty((rows, cut.count), dtype=torch.int64, device=logits.device)
    tile_top = torch.empty_like(tile_sum)
    _weights_kernel[rows, cut.count](
        logits,
        logits.stride(0),
        vocabulary,
        tile_max,
        temperature,
        weights,
        tile_sum,
        tile_top,
        TILE=cut.tile,
        TILES=cut.padded,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return weights, tile_sum, tile_top


def aot_cases() -> list[AotCase]:
    """Weights of float32 and bfloat16 logits."""
    return [
        AotCase(
            kernel=_weights_kernel,
            variant=name,
            signature={
                "logits": pointer,
                **LOGITS,
                "tile_max": "*fp32",
                "temperature": "*fp64",
                "weights": "*i64",
                "tile_sum": "*i64",
                "tile_top": "*i64",
            },
            constexprs={"TILE": TILE, "TILES": tiling(VOCABULARY).padded},
            divisible=("logits", "weights", "tile_max", *LOGITS),
            options={"num_warps": 8, "enable_fp_fusion": False},
            expect=dict.fromkeys(
                TARGETS,
                Expect(instructions={"ld.global 16B": 1, "st.global 16B": 1, "fma.f64": 0}),
            ),
        )
        for name, pointer in POINTERS.items()
    ]
