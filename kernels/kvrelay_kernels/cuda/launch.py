"""How the small kernels are launched."""

import torch

from kvrelay_kernels.cuda.device import device_traits


def overlap(tensor: torch.Tensor) -> dict[str, bool]:
    """Launch arguments that let a kernel start while the one before it ends, where the GPU can.

    Programmatic dependent launch, from Hopper on. A kernel that takes these has a constant `PDL` and
    calls `gdc_wait` before its first access to memory that another kernel may write or still read.
    """
    if device_traits(tensor.device).capability >= 90:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
