"""The map that gives every program of an attention kernel an equal share of tiles, made on the device.

Tiles of all sequences stand in one row, sequence after sequence. Of T tiles, program p of P takes
those from floor(p * T / P) to floor((p + 1) * T / P): no two shares differ by more than one tile,
whatever the lengths, and the grid never changes, so a CUDA graph can hold it. With fewer tiles than
programs the first T programs take one each and P above is T.

```
sequence      0 0 0 0 0 0 0 0 0 0 0 0 0 | 1 1 | 2 | 3 3 3 3
program       0 0 0 0 0 1 1 1 1 1 2 2 2   2 2   3   3 3 3 3
work[p]       (0, 0)    (0, 5)    (0, 10)       (2, 0)         work[P] = (4, 0)
tile_starts   0                           13    15  16       20
```
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvrelay_kernels.cuda.registry import TARGETS, AotCase, Expect, Workload

_BLOCK_SEQUENCES = 128
_BLOCK_PROGRAMS = 32


@dataclass(frozen=True, slots=True)
class TileMap:
    """Which tiles each program of a grid handles."""

    work: torch.Tensor
    """`[programs + 1, 2]` int32: first sequence of a program and first tile in it; the next
    program's entry ends it."""
    tile_starts: torch.Tensor
    """`[sequences + 1]` int32: tiles of all sequences before."""

    @property
    def programs(self) -> int:
        return self.work.shape[0] - 1


def decode_tile_map(
    context_lens: torch.Tensor, *, programs: int, tile: int, sliding_window: int | None
) -> TileMap:
    """Map of the key tiles that one query of each sequence sees.

    Args:
        context_lens: `[sequences]` int32 on the GPU.
        programs: size of the grid that will use the map.
        tile: keys a tile; tile i of a sequence begins at key i * tile, counted from the first tile
            that the window touches.
        sliding_window: how many tokens a row sees, itself included; None for all.
    """
    return _tile_map(context_lens, programs=programs, tile=tile, window=sliding_window or 0)


def prefill_tile_map(query_starts: torch.Tensor, *, programs: int, tile: int) -> TileMap:
    """Map of the query tiles of sequences with several queries, one tile a program.

    Args:
        query_starts: `[sequences + 1]` int32 on the GPU.
        programs: how many tiles there are.
        tile: query tokens a tile.
    """
    return _tile_map(query_starts, programs=programs, tile=tile, window=None)


def _tile_map(lengths: torch.Tensor, *, programs: int, tile: int, window: int | None) -> TileMap:
    sequences = lengths.shape[0] - (window is None)
    work = torch.empty((programs + 1, 2), dtype=torch.int32, device=lengths.device)
    starts = torch.empty(sequences + 1, dtype=torch.int32, device=lengths.device)
    _tile_map_kernel[(triton.cdiv(programs + 1, _BLOCK_PROGRAMS),)](
        lengths,
        work,
        starts,
        sequences,
        programs,
        window or 0,
        TILE=tile,
        QUERIES=window is None,
        BLOCK_SEQUENCES=_BLOCK_SEQUENCES,
        BLOCK_PROGRAMS=_BLOCK_PROGRAMS,
        num_warps=4,
    )
    return TileMap(work, starts)


@triton.jit
def visible_tiles(context: tl.tensor, window: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Tiles with a key that the last token of a context sees; a window of 0 is none."""
    first = tl.where(window > 0, tl.maximum(context - window, 0), 0)
    return (context + TILE - 1) // TILE - first // TILE


@triton.jit
def _count_tiles(
    lengths: tl.tensor,
    sequence: tl.tensor,
    sequences: tl.tensor,
    window: tl.tensor,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
) -> tl.tensor:
    inside = sequence < sequences
    length = tl.load(lengths + sequence, mask=inside, other=0)
    if QUERIES:
        length = tl.load(lengths + sequence + 1, mask=inside, other=0) - length
    return visible_tiles(length, window, TILE)


@triton.jit(do_not_specialize=["sequences", "programs", "window"])  # they vary by step
def _tile_map_kernel(
    lengths: tl.tensor,
    work: tl.tensor,
    tile_starts: tl.tensor,
    sequences: tl.tensor,
    programs: tl.tensor,
    window: tl.tensor,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
) -> None:
    offsets = tl.arange(0, BLOCK_SEQUENCES)
    total = tl.zeros((), tl.int32)
    for base in tl.range(0, sequences, BLOCK_SEQUENCES):
        tiles = _count_tiles(lengths, base + offsets, sequences, window, TILE, QUERIES)
        total += tl.sum(tiles)
    program = tl.program_id(0) * BLOCK_PROGRAMS + tl.arange(0, BLOCK_PROGRAMS)
    busy = tl.maximum(tl.minimum(programs, total), 1)
    # 264 programs times the tiles of 256 contexts of a million keys pass 2**31.
    start = tl.minimum(program.to(tl.int64) * total // busy, total).to(tl.int32)
    sequence = tl.zeros((BLOCK_PROGRAMS,), tl.int32)
    before = tl.zeros((BLOCK_PROGRAMS,), tl.int32)
    carry = tl.zeros((), tl.int32)
    for base in tl.range(0, sequences, BLOCK_SEQUENCES):
        tiles = _count_tiles(lengths, base + offsets, sequences, window, TILE, QUERIES)
        ends = carry + tl.cumsum(tiles)
        inside = base + offsets < sequences
        passed = (ends[None, :] <= start[:, None]) & inside[None, :]
        sequence += tl.sum(passed.to(tl.int32), 1)
        before = tl.maximum(before, tl.max(tl.where(passed, ends[None, :], 0), 1))
        if tl.program_id(0) == 0:
            tl.store(tile_starts + base + offsets + 1, ends, mask=inside)
        carry += tl.sum(tiles)
    if tl.program_id(0) == 0:
        tl.store(tile_starts, 0)
    inside = program <= programs
    tl.store(work + 2 * program, sequence, mask=inside)
    tl.store(work + 2 * program + 1, start - before, mask=inside)


def aot_cases() -> list[AotCase]:
    """The map of a decode step and of a prefill step."""
    return [
        AotCase(
            kernel=_tile_map_kernel,
            variant=variant,
            signature={
                "lengths": "*i32",
                "work": "*i32",
                "tile_starts": "*i32",
                "sequences": "i32",
                "programs": "i32",
                "window": "i32",
            },
            constexprs={
                "TILE": tile,
                "QUERIES": queries,
                "BLOCK_SEQUENCES": _BLOCK_SEQUENCES,
                "BLOCK_PROGRAMS": _BLOCK_PROGRAMS,
            },
            divisible=("lengths", "work", "tile_starts"),
            options={"num_warps": 4},
            expect={target: Expect(blocks_per_sm=4) for target in TARGETS},
        )
        for variant, tile, queries in (("keys", 64, False), ("queries", 32, True))
    ]


def workloads() -> list[Workload]:
    """The map of a decode step, 33 programs for each KV head; all layers of the step share it."""
    programs = 33
    return [
        Workload(
            op="decode_tile_map",
            kernels=("tile_map",),
            shape=f"{sequences} sequences",
            # The lengths; two numbers for each program and the end, one for each sequence and the end.
            bytes=4 * sequences + 8 * (programs + 1) + 4 * (sequences + 1),
            # A comparison and a sum for each program and sequence, and the scans.
            flops=2 * (programs + 5) * sequences,
            expected_share=0.5,
            because="once a step: two walks over the lengths, each a load and a scan deep",
            dtype="int32",
            latency_us=latency_us,
        )
        for sequences, latency_us in ((32, 2.5), (256, 4.0))
    ]
