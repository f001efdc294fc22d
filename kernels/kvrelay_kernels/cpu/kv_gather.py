"""ctypes side of kv_gather.cpp."""

import ctypes
from typing import ClassVar

import torch

from kvrelay_kernels.cpu.library import CpuLibrary, OpArgs


class KvCopyArgs(OpArgs):
    """Mirror of `kvr::kv_copy_args`."""

    op = "kv_copy"
    _fields_: ClassVar = [
        ("layers", ctypes.c_void_p),
        ("layer_stride", ctypes.c_int64),
        ("half_stride", ctypes.c_int64),
        ("block_bytes", ctypes.c_int64),
        ("num_layers", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("buffer", ctypes.c_void_p),
        ("valid_bytes", ctypes.c_int64),
        ("scatter", ctypes.c_int64),
        ("sums", ctypes.c_void_p),
    ]


def kv_gather_cpu(
    library: CpuLibrary,
    layers: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    *,
    valid_tokens: int,
    digest: bool,
) -> torch.Tensor | None:
    """Gather; the digest's sums, `[2]` int64, if asked for."""
    return _copy(library, layers, blocks, out, valid_tokens, scatter=False, digest=digest)


def kv_scatter_cpu(
    library: CpuLibrary,
    layers: torch.Tensor,
    blocks: torch.Tensor,
    buffer: torch.Tensor,
    *,
    digest: bool,
) -> torch.Tensor | None:
    """Scatter; the digest's sums, `[2]` int64, if asked for."""
    return _copy(library, layers, blocks, buffer, layers.shape[3], scatter=True, digest=digest)


def _copy(
    library: CpuLibrary,
    layers: torch.Tensor,
    blocks: torch.Tensor,
    buffer: torch.Tensor,
    valid_tokens: int,
    *,
    scatter: bool,
    digest: bool,
) -> torch.Tensor | None:
    _check_inside(blocks, layers.shape[2])
    item = layers.itemsize
    block_bytes = layers[0, 0, 0].nbytes
    blocks = blocks.contiguous()
    sums = torch.empty(2, dtype=torch.int64) if digest else None
    library.run(
        KvCopyArgs(
            layers=layers.data_ptr(),
            layer_stride=layers.stride(0) * item,
            half_stride=layers.stride(1) * item,
            block_bytes=block_bytes,
            num_layers=layers.shape[0],
            blocks=blocks.data_ptr(),
            num_blocks=len(blocks),
            buffer=buffer.data_ptr(),
            valid_bytes=block_bytes // layers.shape[3] * valid_tokens,
            scatter=int(scatter),
            sums=None if sums is None else sums.data_ptr(),
        )
    )
    return sums


def _check_inside(blocks: torch.Tensor, num_blocks: int) -> None:
    """Torch would refuse such an index; a kernel would follow it out of the pool."""
    smallest, largest = blocks.aminmax()
    if smallest < 0 or largest >= num_blocks:
        raise IndexError(f"a block is outside 0..{num_blocks - 1}")
