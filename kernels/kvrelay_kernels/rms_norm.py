"""Root mean square normalisation, alone and fused with the residual addition before it.

    rms_norm(x) = cast(x / sqrt(mean(x^2) + eps)) * weight

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467).
"""

import torch

from kvrelay_kernels.checks import check_shape


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dimension of `x`.

    Args:
        x: `[..., n]`, any float dtype.
        weight: `[n]`, dtype of `x`.
        eps: added to the mean square.

    Returns:
        A new tensor, shape and dtype of `x`.

    Raises:
        ValueError: `weight` does not match the last dimension.
    """
    check_shape("weight", weight, (x.shape[-1],))
    # The mean of squares overflows float16 and loses half of bfloat16's digits: always float32. The
    # cast comes before the weight, as in the implementations the checkpoints were trained with.
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add `x` into `residual` in place and return the sum normalised.

    Args:
        x: `[..., n]`, any float dtype.
        residual: shape and dtype of `x`; holds `residual + x` afterwards.
        weight: `[n]`, dtype of `x`.
        eps: added to the mean square.

    Returns:
        A new tensor, shape and dtype of `x`.

    Raises:
        ValueError: the shapes do not match.
    """
    check_shape("residual", residual, tuple(x.shape))
    residual.add_(x)
    return rms_norm(residual, weight, eps)
