"""ctypes side of rms_norm.cpp."""

import ctypes
from typing import ClassVar

import torch

from kvrelay_kernels.cpu.library import Count, CpuLibrary, OpArgs


class RmsNormArgs(OpArgs):
    """Mirror of `kvr::rms_norm_args`."""

    op = "rms_norm"
    _fields_: ClassVar = [
        ("rows", Count),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("residual_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("eps", ctypes.c_double),
    ]


def rms_norm_cpu(
    library: CpuLibrary,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor,
) -> None:
    """`x`, `residual` and `out` are `[rows, n]` float32 with contiguous rows."""
    library.run(
        RmsNormArgs(
            rows=library.rows(x),
            x=x.data_ptr(),
            x_stride=x.stride(0),
            residual=None if residual is None else residual.data_ptr(),
            residual_stride=0 if residual is None else residual.stride(0),
            weight=weight.data_ptr(),
            out=out.data_ptr(),
            out_stride=out.stride(0),
            width=x.shape[1],
            eps=eps,
        )
    )
