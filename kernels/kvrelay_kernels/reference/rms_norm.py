"""Root mean square normalisation in torch."""

import torch


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor
) -> torch.Tensor:
    """`kvrelay_kernels.rms_norm.rms_norm` on any device, in any dtype."""
    # The mean of squares overflows float16 and loses half of bfloat16's digits: always float32. The
    # cast comes before the weight, as in the implementations the checkpoints were trained with.
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return torch.mul(normed.to(x.dtype), weight, out=out)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor
) -> torch.Tensor:
    """`kvrelay_kernels.rms_norm.add_rms_norm` on any device, in any dtype."""
    residual.add_(x)
    return rms_norm_reference(residual, weight, eps, out=out)
