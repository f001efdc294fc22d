"""Root mean square normalisation in Triton: one program a row, which is read and written once."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvrelay_kernels.cuda.launch import overlap
from kvrelay_kernels.cuda.registry import AotCase, Expect, Workload


@triton.jit
def _normalised(wide: tl.tensor, weight: tl.tensor, width: tl.tensor, eps: tl.tensor) -> tl.tensor:
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    # Rounded before the weight, as the reference does.
    return (wide * scale).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x: tl.tensor,
    x_stride: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    weights = tl.load(weight + at, mask=inside, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    wide = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    normed = _normalised(wide, weights, width, eps)
    tl.store(out + row * width + at, normed, mask=inside)


@triton.jit
def _add_rms_norm_kernel(
    x: tl.tensor,
    x_stride: tl.tensor,
    residual: tl.tensor,
    residual_stride: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    weights = tl.load(weight + at, mask=inside, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    added = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    place = residual + row * residual_stride + at
    held = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    total = (held + added).to(residual.dtype.element_ty)
    tl.store(place, total, mask=inside)
    normed = _normalised(total.to(tl.float32), weights, width, eps)
    tl.store(out + row * width + at, normed, mask=inside)


def rms_norm_cuda(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor
) -> torch.Tensor:
    """`kvrelay_kernels.rms_norm.rms_norm` on a GPU; `out` contiguous."""
    rows = x.flatten(0, -2)
    block, warps = _block(x.shape[-1])
    if len(rows):
        _rms_norm_kernel[(len(rows),)](
            _rows_contiguous(rows),
            rows.stride(0),
            weight,
            out.view(-1, x.shape[-1]),
            x.shape[-1],
            eps,
            BLOCK=block,
            num_warps=warps,
            **overlap(x),
        )
    return out


def add_rms_norm_cuda(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor
) -> torch.Tensor:
    """`kvrelay_kernels.rms_norm.add_rms_norm` on a GPU; `residual` and `out` contiguous."""
    rows = x.flatten(0, -2)
    sums = residual.view(-1, x.shape[-1])
    block, warps = _block(x.shape[-1])
    if len(rows):
        _add_rms_norm_kernel[(len(rows),)](
            _rows_contiguous(rows),
            rows.stride(0),
            sums,
            sums.stride(0),
            weight,
            out.view(-1, x.shape[-1]),
            x.shape[-1],
            eps,
            BLOCK=block,
            num_warps=warps,
            **overlap(x),
        )
    return out


def _rows_contiguous(rows: torch.Tensor) -> torch.Tensor:
    if rows.stride(-1) != 1:
        raise ValueError("the rows of x must be contiguous")
    return rows


def _block(width: int) -> tuple[int, int]:
    """Elements of a program and its warps: two loads of 16 bytes a thread, up to 16 warps."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


_WIDTH = 4096
_VECTORS = Expect(instructions={"ld.global 16B": 2, "st.global 16B": 1}, blocks_per_sm=4)
_EXPECT = {
    80: Expect(_VECTORS.instructions, 4, constexprs={"PDL": False}),
    90: Expect(
        {**_VECTORS.instructions, "griddepcontrol": 2}, 4, {"launch_pdl": True}, {"PDL": True}
    ),
    100: Expect(
        {**_VECTORS.instructions, "griddepcontrol": 2}, 4, {"launch_pdl": True}, {"PDL": True}
    ),
}


def aot_cases() -> list[AotCase]:
    """Both kernels at the width of an 8B model."""
    block, warps = _block(_WIDTH)
    cases = []
    for name, pointer in (("bfloat16", "*bf16"), ("float16", "*fp16"), ("float32", "*fp32")):
        shared = {"width": "i32", "eps": "fp32"}
        tensors = {"x": pointer, "x_stride": "i64", "weight": pointer, "out": pointer}
        summed = {"residual": pointer, "residual_stride": "i64"}
        divisible = ("x", "x_stride", "weight", "out", "width")
        for kernel, extra in ((_rms_norm_kernel, {}), (_add_rms_norm_kernel, summed)):
            cases.append(
                AotCase(
                    kernel=kernel,
                    variant=f"{name}, {_WIDTH} columns",
                    signature={**tensors, **extra, **shared},
                    constexprs={"BLOCK": block},
                    divisible=(*divisible, *extra),
                    options={"num_warps": warps},
                    expect=_EXPECT,
                )
            )
    return cases


def workloads() -> list[Workload]:
    """Decode and prefill batches of an 8B model."""
    because = "one pass of 16-byte accesses; a single row is the launch, a load and a sum"
    return [
        Workload(
            op=op,
            kernels=(op,),
            shape=f"{rows} x {_WIDTH}",
            bytes=(tensors * rows + 1) * _WIDTH * 2,
            flops=operations * rows * _WIDTH,
            expected_share=0.8,
            because=because,
            latency_us=2.0,
        )
        # x and the result, with the residual in and out for the sum; the weight once.
        for op, tensors, operations in (("rms_norm", 2, 4), ("add_rms_norm", 4, 5))
        for rows in (1, 256, 8192)
    ]
