"""ctypes side of silu_mul.cpp."""

import ctypes
from typing import ClassVar

import torch

from kvrelay_kernels.cpu.library import Count, CpuLibrary, OpArgs


class SiluMulArgs(OpArgs):
    """Mirror of `kvr::silu_mul_args`."""

    op = "silu_mul"
    _fields_: ClassVar = [
        ("rows", Count),
        ("gate_up", ctypes.c_void_p),
        ("gate_up_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]


def silu_mul_cpu(library: CpuLibrary, gate_up: torch.Tensor, *, out: torch.Tensor) -> None:
    """`gate_up` is `[rows, 2 * n]` and `out` `[rows, n]`, float32 with contiguous rows."""
    library.run(
        SiluMulArgs(
            rows=library.rows(gate_up),
            gate_up=gate_up.data_ptr(),
            gate_up_stride=gate_up.stride(0),
            out=out.data_ptr(),
            out_stride=out.stride(0),
            width=out.shape[1],
        )
    )
