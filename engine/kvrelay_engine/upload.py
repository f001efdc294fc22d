"""A step's host arrays on the device, in one copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 16

_DTYPES: dict[str, torch.dtype] = {
    "int64": torch.int64,
    "int32": torch.int32,
    "float64": torch.float64,
    "float32": torch.float32,
}


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors of the same shapes and dtypes.

    On a CPU they share the arrays' memory. Elsewhere they are views of one buffer, which travels from
    pinned memory in one transfer that the host does not wait for: a dozen small copies would each
    cost as much as a kernel.

    Args:
        arrays: int64, int32, float64 or float32, C-contiguous.
        device: where the tensors are wanted.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    staged = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = staged.numpy()
    for start, array in zip(starts, arrays, strict=True):
        host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    # Torch keeps the pinned block from being used again until the copy is done.
    moved = staged.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]
