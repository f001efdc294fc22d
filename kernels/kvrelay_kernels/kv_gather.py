"""Whole blocks of a group of layers, to and from one contiguous buffer.

    buffer[l, kv, i] = pool[l, kv, blocks[i]]        (gather; scatter is the inverse)

One buffer a layer group is what travels between workers in a single message.
"""

import torch

from kvrelay_kernels.checks import check_dtype, check_shape


def kv_gather(layers: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor) -> None:
    """Copy blocks of `layers` into `out`, in the order of `blocks`.

    Args:
        layers: `[layers, 2, num_blocks, block_size, kv_heads, head_dim]`, a group of a pool.
        blocks: `[blocks]` int64, physical block indices on the device of `layers`.
        out: `[layers, 2, blocks, block_size, kv_heads, head_dim]`, contiguous, same dtype and device.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    _check_buffer("out", layers, blocks, out)
    torch.index_select(layers, 2, blocks, out=out)


def kv_scatter(layers: torch.Tensor, blocks: torch.Tensor, buffer: torch.Tensor) -> None:
    """Copy `buffer` into distinct blocks of `layers`, in the order of `blocks`.

    Args:
        layers: `[layers, 2, num_blocks, block_size, kv_heads, head_dim]`, a group of a pool.
        blocks: `[blocks]` int64, distinct physical block indices on the device of `layers`.
        buffer: `[layers, 2, blocks, block_size, kv_heads, head_dim]`, same dtype and device.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    _check_buffer("buffer", layers, blocks, buffer)
    layers.index_copy_(2, blocks, buffer)


def _check_buffer(
    name: str, layers: torch.Tensor, blocks: torch.Tensor, buffer: torch.Tensor
) -> None:
    if layers.dim() != 6:
        raise ValueError(f"layers has {layers.dim()} dimensions, expected 6")
    check_dtype("blocks", blocks, torch.int64)
    check_dtype(name, buffer, layers.dtype)
    check_shape(name, buffer, (*layers.shape[:2], blocks.shape[0], *layers.shape[3:]))
