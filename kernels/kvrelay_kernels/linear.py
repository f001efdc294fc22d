"""The projections of a model: weights in the layout of whichever kernel multiplies them.

    out = x @ weight.T + bias
    int8:   weight[n, k] ~ scale[n] * q[n, k],  q = round(weight / scale),  scale[n] = max|weight[n]| / 127
    int16:  weight[n, k] ~ scale[n, k // 64] * q[n, k],  scale[n, b] = max|weight[n, 64 b : 64 b + 64]| / 5792

On a CPU the weights are packed once into tiles (cpu/linear.hpp) and activations are float32 whatever
the weights are stored in; on a GPU they stay as they are and the vendor's library multiplies. int16 is
how bfloat16 weights are packed for CPUs whose 16-bit dot products outrun float32 (docs/adr/0012).

Sources: symmetric per-channel weights as in Jacob et al., 2018 (arXiv:1712.05877), here with activations
left (nearly) as they are; block floating point as in Wilkinson, Rounding Errors in Algebraic Processes, 1963.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvrelay_kernels.checks import check_dtype, check_shape
from kvrelay_kernels.cpu import linear as cpu
from kvrelay_kernels.cpu.library import CpuLibrary, cpu_library, native
from kvrelay_kernels.reference.linear import linear_reference, quantise_int8_reference


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """One projection, ready to multiply. Made by `pack_linear`."""

    outputs: int
    width: int
    dtype: torch.dtype
    """What the weights are stored in: float32, bfloat16, float16, int8 or int16."""
    data: torch.Tensor
    """Packed bytes if `library` is set, else `[outputs, width]`."""
    scale: torch.Tensor | None
    """float32: `[outputs]` for int8, `[tiles, blocks, 32]` for int16, else None."""
    bias: torch.Tensor | None
    """`[outputs]`, dtype of the activations."""
    library: CpuLibrary | None
    """The kernels that read `data`; None where torch does."""

    @property
    def nbytes(self) -> int:
        """What one pass over the weights reads."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dense(self) -> torch.Tensor:
        """`[outputs, width]` as stored, without the scale; a copy where the weights are packed."""
        if self.library is None:
            return self.data
        return cpu.unpack(self.data, self.dtype, self.outputs, self.width)

    def rows(self, first: int, end: int) -> torch.Tensor:
        """`[end - first, width]` as stored, without the scale; a copy where the weights are packed."""
        if self.library is None:
            return self.data[first:end]
        return cpu.unpack_rows(self.data, self.dtype, first, end, self.width)


def activation_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What a model stored in `dtype` computes in: on a CPU with compiled kernels always float32."""
    return torch.float32 if device.type == "cpu" and cpu_library() is not None else dtype


def pack_linear(
    parts: Sequence[torch.Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> LinearWeights:
    """Stack checkpoint tensors along their outputs, in the layout of the device's kernel.

    Args:
        parts: `[rows, width]` each, contiguous, of one dtype (float32, bfloat16 or float16), in host memory.
        device: where `linear` will run.
        dtype: what to store them in; int8 quantises, bfloat16 may be packed as int16 (module docstring).
        bias: `[outputs]` in the dtype of the activations, on the device.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    width = parts[0].shape[1]
    outputs = sum(part.shape[0] for part in parts)
    for part in parts:
        check_shape("part", part, (None, width))
        check_dtype("part", part, torch.float32, torch.bfloat16, torch.float16)
    if bias is not None:
        check_shape("bias", bias, (outputs,))
    library = cpu_library() if device.type == "cpu" and width % 2 == 0 else None
    if library is not None:
        # The kernels take one source format a call; a checkpoint that mixes them is rare.
        kinds = {part.dtype for part in parts}
        sources = [part.contiguous() if len(kinds) == 1 else part.float() for part in parts]
        stored = torch.int16 if dtype == torch.bfloat16 and library.prefers_int16 else dtype
        data, scale = cpu.pack(library, sources, stored)
        return LinearWeights(outputs, width, stored, data, scale, bias, library)
    stacked = torch.empty(
        (outputs, width), dtype=torch.float32 if dtype == torch.int8 else dtype, device=device
    )
    start = 0
    for part in parts:
        stacked[start : start + part.shape[0]].copy_(part)
        start += part.shape[0]
    if dtype == torch.int8:
        data, scale = quantise_int8_reference(stacked)
        return LinearWeights(outputs, width, dtype, data, scale, bias, None)
    # An odd width on a CPU: torch multiplies, and wants the weights in the dtype of the activations.
    data = stacked.to(activation_dtype(device, dtype))
    return LinearWeights(outputs, width, data.dtype, data, None, bias, None)


def linear(
    x: torch.Tensor, weights: LinearWeights, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply packed rows by a projection.

    Args:
        x: `[rows, width]`; float32 where the compiled kernels run, else dtype of the weights (any
            float dtype for int8).
        weights: made for the device of `x`.
        out: `[rows, outputs]` in the dtype of `x`, rows contiguous; allocated if None.

    Returns:
        `out`.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shape("x", x, (None, weights.width))
    if out is None:
        out = torch.empty((x.shape[0], weights.outputs), dtype=x.dtype, device=x.device)
    else:
        check_shape("out", out, (x.shape[0], weights.outputs))
        check_dtype("out", out, x.dtype)
    if weights.library is None:
        native(x, out, supported=False)
        if weights.scale is None and out.is_contiguous():
            check_dtype("x", x, weights.dtype)
            return (
                torch.addmm(weights.bias, x, weights.data.T, out=out)
                if (weights.bias is not None)
                else torch.mm(x, weights.data.T, out=out)
            )
        return out.copy_(linear_reference(x, weights.data, weights.scale, weights.bias))
    check_dtype("x", x, torch.float32)
    if x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("the rows of x and out must be contiguous")
    cpu.linear_cpu(
        weights.library,
        x,
        weights.data,
        dtype=weights.dtype,
        scale=weights.scale,
        bias=weights.bias,
        out=out,
    )
    return out
