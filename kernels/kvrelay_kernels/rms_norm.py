"""Root mean square normalisation, alone and fused with the residual addition before it.

    rms_norm(x) = cast(x / sqrt(mean(x^2) + eps)) * weight

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467).
"""

import torch

from kvrelay_kernels.checks import check_dtype, check_shape
from kvrelay_kernels.cpu.library import native
from kvrelay_kernels.cpu.rms_norm import rms_norm_cpu
from kvrelay_kernels.reference.rms_norm import add_rms_norm_reference, rms_norm_reference


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalise the last dimension of `x`.

    Args:
        x: `[..., n]`, any float dtype.
        weight: `[n]`, dtype of `x`.
        eps: added to the mean square.
        out: shape and dtype of `x`; None allocates.

    Returns:
        `out`.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    out = _checked_out(x, weight, out)
    if x.device.type == "cuda":
        from kvrelay_kernels.cuda.rms_norm import rms_norm_cuda

        return rms_norm_cuda(x, weight, eps, out=out)
    library = native(x, weight, out, supported=x.dim() == 2)
    if library is not None:
        rms_norm_cpu(library, x, weight, eps, out=out)
        return out
    return rms_norm_reference(x, weight, eps, out=out)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add `x` into `residual` in place and return the sum normalised.

    Args:
        x: `[..., n]`, any float dtype.
        residual: shape and dtype of `x`; holds `residual + x` afterwards.
        weight: `[n]`, dtype of `x`.
        eps: added to the mean square.
        out: shape and dtype of `x`; None allocates. It may be `x` itself.

    Returns:
        `out`.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shape("residual", residual, tuple(x.shape))
    check_dtype("residual", residual, x.dtype)
    out = _checked_out(x, weight, out)
    if x.device.type == "cuda":
        from kvrelay_kernels.cuda.rms_norm import add_rms_norm_cuda

        return add_rms_norm_cuda(x, residual, weight, eps, out=out)
    library = native(x, residual, weight, out, supported=x.dim() == 2)
    if library is not None:
        rms_norm_cpu(library, x, weight, eps, residual=residual, out=out)
        return out
    return add_rms_norm_reference(x, residual, weight, eps, out=out)


def _checked_out(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    check_shape("weight", weight, (x.shape[-1],))
    check_dtype("weight", weight, x.dtype)
    if out is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check_shape("out", out, tuple(x.shape))
    check_dtype("out", out, x.dtype)
    return out
