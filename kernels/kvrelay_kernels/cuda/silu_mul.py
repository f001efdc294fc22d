"""The gate of a SwiGLU block in Triton: one program a block of columns of one row."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvrelay_kernels.cuda.launch import overlap
from kvrelay_kernels.cuda.registry import AotCase, Expect, Workload

BLOCK = 1024


@triton.jit
def _silu_mul_kernel(
    gate_up: tl.tensor,
    stride: tl.tensor,
    out: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    source = gate_up + row * stride + at
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
    # Rounded before the product, as the reference does.
    activated = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * columns + at, activated * up, mask=inside)


def silu_mul_cuda(gate_up: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """`kvrelay_kernels.silu_mul.silu_mul` on a GPU; `out` contiguous."""
    rows = gate_up.flatten(0, -2)
    if rows.stride(-1) != 1:
        raise ValueError("the rows of gate_up must be contiguous")
    columns = out.shape[-1]
    if len(rows):
        _silu_mul_kernel[len(rows), triton.cdiv(columns, BLOCK)](
            rows, rows.stride(0), out.view(-1, columns), columns, BLOCK=BLOCK, **overlap(gate_up)
        )
    return out


_COLUMNS = 14336
_VECTORS = {"ld.global 16B": 2, "st.global 16B": 1}
_OVERLAPPED = Expect({**_VECTORS, "griddepcontrol": 2}, 8, {"launch_pdl": True}, {"PDL": True})
_EXPECT = {
    80: Expect(_VECTORS, 8, constexprs={"PDL": False}),
    90: _OVERLAPPED,
    100: _OVERLAPPED,
}


def aot_cases() -> list[AotCase]:
    """The feed-forward width of an 8B model."""
    return [
        AotCase(
            kernel=_silu_mul_kernel,
            variant=f"{name}, {_COLUMNS} columns",
            signature={"gate_up": pointer, "stride": "i64", "out": pointer, "columns": "i32"},
            constexprs={"BLOCK": BLOCK},
            divisible=("gate_up", "stride", "out", "columns"),
            expect=_EXPECT,
        )
        for name, pointer in (("bfloat16", "*bf16"), ("float16", "*fp16"), ("float32", "*fp32"))
    ]


def workloads() -> list[Workload]:
    """Decode and prefill batches of an 8B model."""
    return [
        Workload(
            op="silu_mul",
            kernels=("silu_mul",),
            shape=f"{rows} x {_COLUMNS}",
            bytes=3 * rows * _COLUMNS * 2,
            flops=5 * rows * _COLUMNS,
            expected_share=0.85,
            because="16-byte accesses and no reuse; a single row is the launch and a load",
            latency_us=2.0,
        )
        for rows in (1, 256, 8192)
    ]
