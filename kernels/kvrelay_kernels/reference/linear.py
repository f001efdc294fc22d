"""Torch reference of `kvrelay_kernels.linear`."""

import torch
from torch.nn import functional


def quantise_int8_reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[outputs, width]` int8 and `[outputs]` float32: symmetric, one scale an output."""
    wide = weight.float()
    scale = wide.abs().amax(1) / 127.0
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    return (wide * inverse.unsqueeze(1)).round().to(torch.int8), scale


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`x @ weight.T`, times the scale of each output if there is one, plus the bias."""
    if scale is None:
        return functional.linear(x, weight, bias)
    product = functional.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
    return product if bias is None else product + bias
