"""Torch reference of `kvrelay_kernels.linear`."""

import torch
from torch.nn import functional


def quantise_int8_reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[outputs, width]` int8 and `[outputs]` float32: symmetric, one scale an output."""
    wide = weight.float()
    most = wide.abs().amax(1)
    factor = torch.where(most > 0, torch.full_like(most, 127.0) / most, 0.0)
    return (wide * factor.unsqueeze(1)).round().to(torch.int8), most / 127.0


def quantise_int16_reference(
    weight: torch.Tensor, block: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[outputs, width]` int16 and `[outputs, blocks]` float32: symmetric, one scale a block of inputs."""
    padded = functional.pad(weight.float(), (0, -weight.shape[1] % block))
    blocks = padded.reshape(len(weight), -1, block)
    most = blocks.abs().amax(2)
    factor = torch.where(most > 0, torch.full_like(most, 5792.0) / most, 0.0)
    stored = (blocks * factor.unsqueeze(2)).round().to(torch.int16)
    return stored.flatten(1)[:, : weight.shape[1]].contiguous(), most / 5792.0


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
