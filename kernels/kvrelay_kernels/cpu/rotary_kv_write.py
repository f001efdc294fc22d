"""ctypes side of rotary_kv_write.cpp."""

import ctypes
from typing import ClassVar

import torch

from kvrelay_kernels.cpu.library import FORMATS, Count, CpuLibrary, OpArgs


class RotaryKvWriteArgs(OpArgs):
    """Mirror of `kvr::rotary_kv_write_args`."""

    op = "rotary_kv_write"
    _fields_: ClassVar = [
        ("tokens", Count),
        ("qkv", ctypes.c_void_p),
        ("qkv_stride", ctypes.c_int64),
        ("key_cache", ctypes.c_void_p),
        ("value_cache", ctypes.c_void_p),
        ("format", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("angle_stride", ctypes.c_int64),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("angles", ctypes.c_int64),
    ]


def rotary_kv_write_cpu(  # noqa: PLR0917 # tensors by position, settings by name
    library: CpuLibrary,
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
) -> None:
    """All but the caches and the slots are float32; heads of a row of `qkv` are contiguous."""
    _, _, kv_heads, head_dim = key_cache.shape
    library.run(
        RotaryKvWriteArgs(
            tokens=library.rows(qkv),
            qkv=qkv.data_ptr(),
            qkv_stride=qkv.stride(0),
            key_cache=key_cache.data_ptr(),
            value_cache=value_cache.data_ptr(),
            format=FORMATS[key_cache.dtype],
            slots=slots.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            angle_stride=cos.stride(0),
            query_norm=None if query_norm is None else query_norm.data_ptr(),
            key_norm=None if key_norm is None else key_norm.data_ptr(),
            eps=eps,
            heads=qkv.shape[1] - 2 * kv_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            angles=cos.shape[1],
        )
    )
