"""The gate of a SwiGLU feed-forward block over a fused gate/up projection.

    silu_mul([gate, up]) = gate * sigmoid(gate) * up

Source: Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv:2002.05202).
"""

import torch

from kvrelay_kernels.checks import check_dtype, check_shape
from kvrelay_kernels.cpu.library import native
from kvrelay_kernels.cpu.silu_mul import silu_mul_cpu
from kvrelay_kernels.reference.silu_mul import silu_mul_reference


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply the up half by the activated gate half.

    Args:
        gate_up: `[..., 2 * n]`, any float dtype, gate first.
        out: `[..., n]`, dtype of `gate_up`; None allocates.

    Returns:
        `out`.

    Raises:
        ValueError: the last dimension is odd, or `out` does not match.
    """
    *rows, width = gate_up.shape
    if width % 2:
        raise ValueError(f"gate_up has an odd last dimension: {list(gate_up.shape)}")
    if out is None:
        out = torch.empty((*rows, width // 2), dtype=gate_up.dtype, device=gate_up.device)
    check_shape("out", out, (*rows, width // 2))
    check_dtype("out", out, gate_up.dtype)
    if gate_up.device.type == "cuda":
        from kvrelay_kernels.cuda.silu_mul import silu_mul_cuda

        return silu_mul_cuda(gate_up, out=out)
    library = native(gate_up, out, supported=gate_up.dim() == 2)
    if library is not None:
        silu_mul_cpu(library, gate_up, out=out)
        return out
    return silu_mul_reference(gate_up, out=out)
