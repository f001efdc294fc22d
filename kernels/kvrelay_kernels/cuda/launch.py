"""How the small kernels are launched."""

import functools

import torch


@functools.cache
def _overlaps(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def overlap(tensor: torch.Tensor) -> dict[str, bool]:
    """Launch arguments that let a kernel start while the one before it ends, where the GPU can.

    Programmatic dependent launch, from Hopper on. A kernel that takes these has a constant `PDL` and
    calls `gdc_wait` before its first access to memory that another kernel may write or still read.
    """
    if tensor.device.type == "cuda" and _overlaps(tensor.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
