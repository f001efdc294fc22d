"""Penalties in Triton, on the logits of tokens that a sequence holds already."""

import torch
import triton
import triton.language as tl

from kvrelay_kernels.cuda.registry import AotCase, Workload


@triton.jit
def _penalties_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    token_ids: tl.tensor,
    pair_rows: tl.tensor,
    output_counts: tl.tensor,
    presence: tl.tensor,
    frequency: tl.tensor,
    repetition: tl.tensor,
    pairs: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    row = tl.load(pair_rows + pair, mask=inside, other=0)
    place = logits + row * stride + tl.load(token_ids + pair, mask=inside, other=0)
    count = tl.load(output_counts + pair, mask=inside, other=0)
    factor = tl.load(repetition + row, mask=inside, other=1.0)
    value = tl.load(place, mask=inside, other=0.0)
    value = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
    often = tl.load(frequency + row, mask=inside, other=0.0) * count.to(tl.float32)
    once = tl.load(presence + row, mask=inside, other=0.0) * (count > 0).to(tl.float32)
    tl.store(place, value - (often + once), mask=inside)


def apply_penalties_cuda(
    logits: torch.Tensor,
    *,
    token_ids: torch.Tensor,
    pair_rows: torch.Tensor,
    output_counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """`kvrelay_kernels.sampling.apply_penalties` on a GPU; rows contiguous."""
    pairs = token_ids.shape[0]
    if not pairs:
        return
    if logits.stride(1) != 1:
        raise ValueError("the rows of logits must be contiguous")
    _penalties_kernel[(triton.cdiv(pairs, 256),)](
        logits,
        logits.stride(0),
        token_ids.contiguous(),
        pair_rows.contiguous(),
        output_counts.contiguous(),
        presence.contiguous(),
        frequency.contiguous(),
        repetition.contiguous(),
        pairs,
        BLOCK=256,
        enable_fp_fusion=False,
    )


def aot_cases() -> list[AotCase]:
    """Penalties on float32 logits, the one format they are applied to."""
    return [
        AotCase(
            kernel=_penalties_kernel,
            variant="",
            signature={
                "logits": "*fp32",
                "stride": "i64",
                "token_ids": "*i64",
                "pair_rows": "*i64",
                "output_counts": "*i32",
                **dict.fromkeys(("presence", "frequency", "repetition"), "*fp32"),
                "pairs": "i32",
            },
            constexprs={"BLOCK": 256},
            divisible=("logits", "token_ids", "pair_rows", "output_counts"),
            options={"enable_fp_fusion": False},
        ),
    ]


def workloads() -> list[Workload]:
    """Sequences that hold 512 distinct tokens each."""
    distinct = 512
    return [
        Workload(
            op="apply_penalties",
            kernels=("penalties",),
            shape=f"{rows} x {distinct} tokens",
            # Token and row of 8 bytes, a count, a logit in and out; three factors a row.
            bytes=28 * rows * distinct + 12 * rows,
            flops=5 * rows * distinct,
            expected_share=0.2,
            because="every logit is alone in its 32-byte sector"
            if rows > 1
            else "14 KB: nothing but its launch",
            dtype="float32",
        )
        for rows in (1, 256)
    ]
