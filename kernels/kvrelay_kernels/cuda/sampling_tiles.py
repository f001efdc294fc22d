"""What the sampling kernels share: rows of logits cut into tiles, and the largest logit of each.

A vocabulary has hundreds of tiles and a batch may have one row: programs of one tile each fill the
GPU either way. The few numbers of every tile are then combined by one program a row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvrelay_kernels.cuda.registry import TARGETS, AotCase, Expect, Workload

TILE = 2048
VOCABULARY = 128256
"""Of Llama 3, which cases and workloads are given for."""
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16"}
"""Formats of logits that are compiled ahead of time."""
LOGITS = {"stride": "i64", "vocabulary": "i32"}
"""Triton types of what describes logits, beside their pointer."""
WIDE_LOADS = dict.fromkeys(TARGETS, Expect(instructions={"ld.global 16B": 1}))


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one row of logits is cut."""

    tile: int
    """Logits in a tile, a power of two."""
    count: int
    """Tiles of a row; the last one may be short."""

    @property
    def padded(self) -> int:
        """`count`, rounded up to a power of two: what one program loads at once."""
        return int(triton.next_power_of_2(self.count))


def tiling(vocabulary: int) -> Tiling:
    """How rows of `vocabulary` logits are cut."""
    return Tiling(TILE, triton.cdiv(vocabulary, TILE))


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


def tile_maxima(
    logits: torch.Tensor, cut: Tiling, *, with_arg: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The largest logit of every tile, `[rows, tiles]` float32, and where it is first, int32."""
    shape = (logits.shape[0], cut.count)
    tile_max = torch.empty(shape, dtype=torch.float32, device=logits.device)
    tile_arg = torch.empty(shape, dtype=torch.int32, device=logits.device) if with_arg else None
    _tile_max_kernel[shape](
        logits,
        logits.stride(0),
        logits.shape[1],
        tile_max,
        tile_arg,
        TILE=cut.tile,
        WITH_ARG=with_arg,
    )
    return tile_max, tile_arg


def rows_contiguous(logits: torch.Tensor) -> torch.Tensor:
    """`logits`, copied if neighbours in a row lie apart."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def aot_cases() -> list[AotCase]:
    """Tile maxima of float32 and bfloat16 logits, with their places for greedy decoding."""
    return [
        AotCase(
            kernel=_tile_max_kernel,
            variant=f"{name}, for {use}",
            signature={"logits": pointer, **LOGITS, "tile_max": "*fp32", **arg},
            constexprs={"TILE": TILE, "WITH_ARG": bool(arg), **absent},
            divisible=("logits", *LOGITS),
            options={},
            expect=WIDE_LOADS,
        )
        for name, pointer in POINTERS.items()
        for use, arg, absent in (
            ("greedy", {"tile_arg": "*i32"}, {}),
            ("sample", {}, {"tile_arg": None}),
        )
    ]


def logits_workload(
    op: str,
    kernels: tuple[str, ...],
    *,
    rows: int,
    passes: int,
    share: float,
    because: str,
    latency_us: float,
) -> Workload:
    """A decode batch of `rows` rows that moves `passes` times its float32 logits."""
    return Workload(
        op=op,
        kernels=kernels,
        shape=f"{rows} x {VOCABULARY}",
        bytes=passes * rows * VOCABULARY * 4,
        flops=8 * rows * VOCABULARY,
        expected_share=share,
        because=because,
        dtype="float32",
        latency_us=latency_us,
    )
