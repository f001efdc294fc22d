"""ctypes side of linear.cpp and pack_linear.cpp."""

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch

from kvrelay_kernels.cpu.library import FORMATS, Count, CpuLibrary, OpArgs
from kvrelay_kernels.cpu.memory import huge_tensor

TILE = 32
"""Outputs a tile of the packed layout; linear.hpp describes it."""

INT16_BLOCK = 64
"""Inputs that share a scale in the int16 layout (`Int16Blocks` in linear.hpp)."""


class LinearArgs(OpArgs):
    """Mirror of `kvr::linear_args`."""

    op = "linear"
    _fields_: ClassVar = [
        ("rows", Count),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("format", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]


class PackLinearArgs(OpArgs):
    """Mirror of `kvr::pack_linear_args`."""

    op = "pack_linear"
    _fields_: ClassVar = [
        ("parts", ctypes.c_int64),
        ("part_data", ctypes.POINTER(ctypes.c_void_p)),
        ("part_rows", ctypes.POINTER(ctypes.c_int64)),
        ("source_format", ctypes.c_int64),
        ("format", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]


def pack(
    library: CpuLibrary, parts: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed weights, and their scales where `dtype` is int8 or int16.

    Args:
        library: the compiled kernels.
        parts: `[rows, width]` each, contiguous, on the CPU, one dtype; stacked along the outputs.
        dtype: float32, float16, bfloat16, int8 or int16.

    Returns:
        The packed bytes, and float32 scales: `[outputs]` for int8, `[tiles, blocks, TILE]` for int16.
    """
    outputs, width = sum(part.shape[0] for part in parts), parts[0].shape[1]
    padded = -(-outputs // TILE) * TILE
    packed = huge_tensor(padded * width * dtype.itemsize)
    shapes = {torch.int8: (outputs,), torch.int16: (padded // TILE, -(-width // INT16_BLOCK), TILE)}
    scale = torch.empty(shapes[dtype], dtype=torch.float32) if dtype in shapes else None
    library.run(
        PackLinearArgs(
            parts=len(parts),
            part_data=(ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts)),
            part_rows=(ctypes.c_int64 * len(parts))(*(part.shape[0] for part in parts)),
            source_format=FORMATS[parts[0].dtype],
            format=FORMATS[dtype],
            packed=packed.data_ptr(),
            scale=None if scale is None else scale.data_ptr(),
            outputs=outputs,
            width=width,
        )
    )
    return packed, scale


def unpack(packed: torch.Tensor, dtype: torch.dtype, outputs: int, width: int) -> torch.Tensor:
    """The stored numbers again as `[outputs, width]`."""
    if dtype in {torch.bfloat16, torch.int8, torch.int16}:
        tiles = packed.view(dtype).view(-1, width // 2, TILE, 2).permute(0, 2, 1, 3)
    else:
        tiles = packed.view(dtype).view(-1, width, TILE).permute(0, 2, 1)
    return tiles.reshape(-1, width)[:outputs].contiguous()


def unpack_rows(
    packed: torch.Tensor, dtype: torch.dtype, first: int, end: int, width: int
) -> torch.Tensor:
    """`[end - first, width]`: the same of some outputs, reading no other tiles than theirs."""
    tile, tiles = TILE * width * dtype.itemsize, slice(first // TILE, -(-end // TILE))
    some = packed.view(torch.uint8)[tiles.start * tile : tiles.stop * tile]
    skipped = tiles.start * TILE
    return unpack(some, dtype, end - skipped, width)[first - skipped :]


def linear_cpu(
    library: CpuLibrary,
    x: torch.Tensor,
    packed: torch.Tensor,
    *,
    dtype: torch.dtype,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`out = x @ weight.T + bias`; `x` and `out` float32 with contiguous rows."""
    library.run(
        LinearArgs(
            rows=library.rows(x),
            x=x.data_ptr(),
            x_stride=x.stride(0),
            weight=packed.data_ptr(),
            format=FORMATS[dtype],
            scale=None if scale is None else scale.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            out=out.data_ptr(),
            out_stride=out.stride(0),
            outputs=out.shape[1],
            width=x.shape[1],
        )
    )
