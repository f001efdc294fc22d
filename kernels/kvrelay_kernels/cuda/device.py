"""What a launcher must know of the GPU, asked once."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """Facts that decide how a kernel is compiled and how many programs are launched."""

    multiprocessors: int
    capability: int
    """Major and minor as one number: 80, 90, 100."""


_INTERPRETER = DeviceTraits(multiprocessors=2, capability=0)
"""For tensors that Triton's interpreter reads on a CPU."""


def device_traits(device: torch.device) -> DeviceTraits:
    """Traits of the GPU that holds a tensor."""
    return _cuda_traits(device) if device.type == "cuda" else _INTERPRETER


@cache
def _cuda_traits(device: torch.device) -> DeviceTraits:
    properties = torch.cuda.get_device_properties(device)
    return DeviceTraits(properties.multi_processor_count, 10 * properties.major + properties.minor)
