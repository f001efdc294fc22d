"""Log-probabilities and ranks of chosen tokens in Triton, one program a row."""

import torch
import triton
import triton.language as tl

from kvrelay_kernels.cuda.registry import AotCase, Workload
from kvrelay_kernels.cuda.sampling_tiles import (
    LOGITS,
    POINTERS,
    WIDE_LOADS,
    logits_workload,
    rows_contiguous,
)
from kvrelay_kernels.reference.sampling import TokenLogprobs, most_likely


@triton.jit
def _logprobs_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    tokens: tl.tensor,
    logprob: tl.tensor,
    normaliser: tl.tensor,
    rank: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    chosen = tl.load(logits + tl.load(tokens + row)).to(tl.float32)
    lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    at_least = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, vocabulary, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < vocabulary
        value = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        at_least += (inside & (value >= chosen)).to(tl.int32)
        higher = tl.maximum(lane_max, value)
        # Minus infinity minus itself is no number: such lanes have nothing to add yet.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        lane_sum = lane_sum * tl.exp(lane_max - base) + tl.exp(value - base)
        lane_max = higher
    top = tl.max(lane_max, axis=0)
    total = tl.sum(lane_sum * tl.exp(lane_max - top), axis=0)
    log_total = top + tl.log(total)
    tl.store(logprob + row, chosen - log_total)
    tl.store(normaliser + row, log_total)
    tl.store(rank + row, tl.sum(at_least, axis=0).to(tl.int64))


def token_logprobs_cuda(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> TokenLogprobs:
    """`kvrelay_kernels.sampling.token_logprobs` on a GPU."""
    logits = rows_contiguous(logits)
    rows, vocabulary = logits.shape
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    normaliser = torch.empty_like(logprob)
    rank = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _logprobs_kernel[(rows,)](
            logits,
            logits.stride(0),
            vocabulary,
            tokens.contiguous(),
            logprob,
            normaliser,
            rank,
            BLOCK=4096,
            num_warps=8,
        )
    top_ids = most_likely(logits, top)
    top_logprobs = logits.gather(1, top_ids).float() - normaliser.unsqueeze(1)
    return TokenLogprobs(logprob, rank, top_ids, top_logprobs)


def aot_cases() -> list[AotCase]:
    """Log-probabilities of float32 and bfloat16 logits."""
    return [
        AotCase(
            kernel=_logprobs_kernel,
            variant=name,
            signature={
                "logits": pointer,
                **LOGITS,
                "tokens": "*i64",
                "logprob": "*fp32",
                "normaliser": "*fp32",
                "rank": "*i64",
            },
            constexprs={"BLOCK": 4096},
            divisible=("logits", *LOGITS),
            options={"num_warps": 8},
            expect=WIDE_LOADS,
        )
        for name, pointer in POINTERS.items()
    ]


def workloads() -> list[Workload]:
    """Decode batches over a Llama 3 vocabulary."""
    sizes = (
        (1, "one program walks 32 blocks of the row, a load deep each"),
        (256, "one read for the sum, one for rank and the largest"),
    )
    return [
        logits_workload(
            "token_logprobs",
            ("logprobs",),
            rows=rows,
            passes=2,
            share=0.6,
            because=because,
            latency_us=25.0,
        )
        for rows, because in sizes
    ]
