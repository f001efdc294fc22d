"""ctypes side of paged_attention.cpp."""

import ctypes
from typing import ClassVar

import torch

from kvrelay_kernels.checks import check_dtype
from kvrelay_kernels.cpu.library import FORMATS, CpuLibrary, OpArgs
from kvrelay_kernels.layout import AttentionLayout


class AttentionLayoutArgs(ctypes.Structure):
    """Mirror of `kvr::AttentionLayoutArgs`: all that differs between two steps of a recording.

    It points into tensors that it does not own; whoever points it keeps them.
    """

    _fields_: ClassVar = [
        ("block_tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("query_starts", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
    ]

    def point_at(self, layout: AttentionLayout) -> None:
        """Describe the sequences of a layout in host memory.

        Raises:
            ValueError: a tensor of the layout is not int32.
        """
        for name in ("block_tables", "query_starts", "context_lens"):
            tensor: torch.Tensor = getattr(layout, name)
            check_dtype(name, tensor, torch.int32)
            if tensor.stride(-1) != 1:
                raise ValueError(f"the rows of {name} are not contiguous")
            setattr(self, name, tensor.data_ptr())
        self.table_stride = layout.block_tables.stride(0)
        self.sequences = layout.context_lens.shape[0]


def layout_args(layout: AttentionLayout) -> AttentionLayoutArgs:
    """What the kernel reads of a layout; made in a step's first layer.

    A recording keeps it, and sees in each replay what it points at by then.
    """
    found = layout.derived.get(AttentionLayoutArgs)
    if isinstance(found, AttentionLayoutArgs):
        return found
    made = AttentionLayoutArgs()
    made.point_at(layout)
    layout.derived[AttentionLayoutArgs] = made
    return made


class PagedAttentionArgs(OpArgs):
    """Mirror of `kvr::paged_attention_args`."""

    op = "paged_attention"
    _fields_: ClassVar = [
        ("layout", ctypes.POINTER(AttentionLayoutArgs)),
        ("query", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("key_cache", ctypes.c_void_p),
        ("value_cache", ctypes.c_void_p),
        ("format", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("scale", ctypes.c_double),
        ("soft_cap", ctypes.c_double),
        ("window", ctypes.c_int64),
    ]


def paged_attention_cpu(
    library: CpuLibrary,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    out: torch.Tensor,
) -> None:
    """`query` and `out` are float32, `head_dim` is a multiple of 16, the caches are contiguous."""
    _, block_size, kv_heads, head_dim = key_cache.shape
    library.run(
        PagedAttentionArgs(
            layout=ctypes.pointer(layout_args(layout)),
            query=query.data_ptr(),
            query_stride=query.stride(0),
            query_head_stride=query.stride(1),
            key_cache=key_cache.data_ptr(),
            value_cache=value_cache.data_ptr(),
            format=FORMATS[key_cache.dtype],
            block_size=block_size,
            heads=query.shape[1],
            kv_heads=kv_heads,
            head_dim=head_dim,
            out=out.data_ptr(),
            scale=scale,
            soft_cap=soft_cap or 0.0,
            window=sliding_window or 0,
        )
    )
