"""The gate of a SwiGLU feed-forward block over a fused gate/up projection.

    silu_mul([gate, up]) = gate * sigmoid(gate) * up

Source: Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv:2002.05202).
"""

import torch
from torch.nn import functional


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Multiply the up half by the activated gate half.

    Args:
        gate_up: `[..., 2 * n]`, any float dtype, gate first.

    Returns:
        `[..., n]`, dtype of `gate_up`.

    Raises:
        ValueError: the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has an odd last dimension: {list(gate_up.shape)}")
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
