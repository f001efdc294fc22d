"""Greedy decoding in Triton: tile maxima, then one program a row takes the first of the largest."""

import torch
import triton
import triton.language as tl

from kvrelay_kernels.cuda.registry import AotCase, Workload
from kvrelay_kernels.cuda.sampling_tiles import (
    VOCABULARY,
    logits_workload,
    rows_contiguous,
    tile_maxima,
    tiling,
)


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


def greedy_cuda(logits: torch.Tensor) -> torch.Tensor:
    """`kvrelay_kernels.sampling.greedy` on a GPU."""
    logits = rows_contiguous(logits)
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        cut = tiling(vocabulary)
        tile_max, tile_arg = tile_maxima(logits, cut, with_arg=True)
        _greedy_kernel[(rows,)](tile_max, tile_arg, cut.count, tokens, TILES=cut.padded)
    return tokens


def aot_cases() -> list[AotCase]:
    """The second half; the first is in `sampling_tiles`."""
    return [
        AotCase(
            kernel=_greedy_kernel,
            variant="",
            signature={
                "tile_max": "*fp32",
                "tile_arg": "*i32",
                "tiles": "i32",
                "tokens": "*i64",
            },
            constexprs={"TILES": tiling(VOCABULARY).padded},
            divisible=("tile_max", "tile_arg"),
            options={},
        )
    ]


def workloads() -> list[Workload]:
    """Decode batches over a Llama 3 vocabulary."""
    sizes = (
        (1, "two launches, each a load deep"),
        (256, "one read of the logits; a row is cut into tiles to fill the GPU"),
    )
    return [
        logits_workload(
            "greedy",
            ("tile_max", "greedy"),
            rows=rows,
            passes=1,
            share=0.7,
            because=because,
            latency_us=4.0,
        )
        for rows, because in sizes
    ]
