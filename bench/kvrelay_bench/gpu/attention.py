"""Paged attention: decode over uniform and mixed lengths, causal prefill; torch's SDPA beside it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional

from kvrelay_bench.gpu.timing import Call, Stopwatch, poisoned, relative_error
from kvrelay_bench.gpu.work import AttentionShape, Ceilings, Job, Plan, Row, rotations
from kvrelay_kernels.layout import AttentionLayout, attention_layout

_TOLERANCE = {"bfloat16": 1e-2, "float8_e4m3fn": 4e-2}
"""Of the whole result, in norm: operands are rounded to the cache's dtype before both sides see them,
so what is left is the rounding of probabilities and of the result."""
_CHECKED_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Case:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: AttentionLayout
    out: torch.Tensor


def attention_jobs(watch: Stopwatch, plan: Plan, ceilings: Ceilings) -> Iterator[Job]:
    """One job for each shape."""
    for part, shapes in (("decode", plan.decode), ("prefill", plan.prefill)):
        for shape in shapes:
            name = f"paged attention, {shape.cache} KV"
            job = Job(part, name, shape.name, partial(_measure, watch, shape, ceilings))
            if shape.cache == "float8_e4m3fn" and watch.device.type != "cuda":
                job = replace(job, run=partial(job.without, "float8 KV needs a GPU"))
            yield job


def _measure(watch: Stopwatch, shape: AttentionShape, ceilings: Ceilings) -> Row:
    cases = [
        _make_case(shape, watch.device, seed)
        for seed in range(rotations(shape.kv_bytes, ceilings.l2_bytes))
    ]
    timed = watch.time([_call(case, shape) for case in cases])
    case = cases[0]
    case.out.fill_(float("nan"))
    _call(case, shape)()
    complete = bool(case.out.isfinite().all())
    error = _error(case, shape) if complete else float("nan")
    return Row(
        "decode" if shape.new_tokens == 1 else "prefill",
        f"paged attention, {shape.cache} KV",
        shape.name,
        nbytes=shape.nbytes,
        flops=shape.flops,
        seconds=timed.seconds,
        eager_seconds=timed.eager,
        floor_seconds=ceilings.floor_s(shape.nbytes, shape.flops),
        error=error,
        tolerance=_TOLERANCE[shape.cache],
        baselines=_baselines(watch, shape),
    )


def _make_case(shape: AttentionShape, device: torch.device, seed: int) -> _Case:
    generator = torch.Generator(device).manual_seed(seed)
    needed = [-(-length // shape.block_size) for length in shape.context_lens]
    order = torch.randperm(sum(needed), generator=generator, device=device).int()
    tables = torch.zeros(len(needed), max(needed), dtype=torch.int32, device=device)
    start = 0
    for row, count in zip(tables, needed, strict=True):
        row[:count] = order[start : start + count]
        start += count
    dtype = getattr(torch, shape.cache)

    def normal(*size: int) -> torch.Tensor:
        values = torch.empty(size, dtype=torch.bfloat16, device=device)
        return values.normal_(generator=generator)

    cache = (sum(needed), shape.block_size, shape.kv_heads, shape.head_dim)
    query = normal(shape.tokens, shape.heads, shape.head_dim)
    if device.type != "cuda":
        query = query.float()
    layout = attention_layout(
        tables, [shape.new_tokens] * len(shape.context_lens), shape.context_lens
    )
    return _Case(query, normal(*cache).to(dtype), normal(*cache).to(dtype), layout, poisoned(query))


def _call(case: _Case, shape: AttentionShape) -> Call:
    from kvrelay_kernels.paged_attention import paged_attention

    scale = shape.head_dim**-0.5
    return lambda: paged_attention(
        case.query, case.key, case.value, case.layout, scale=scale, out=case.out
    )


def _error(case: _Case, shape: AttentionShape) -> float:
    """Of some rows of every sequence, the first and the last among them, in float64."""
    per_sequence = max(2, _CHECKED_ROWS // len(shape.context_lens))
    picks = torch.linspace(0, shape.new_tokens - 1, min(per_sequence, shape.new_tokens)).long()
    actual, expected = [], []
    for index, context in enumerate(shape.context_lens):
        blocks = case.layout.block_tables[index, : -(-context // shape.block_size)].long()
        keys, values = (
            cache[blocks].flatten(0, 1)[:context].double() for cache in (case.key, case.value)
        )
        for pick in sorted(set(picks.tolist())):
            row = index * shape.new_tokens + pick
            visible = context - shape.new_tokens + pick + 1
            query = case.query[row].double().view(shape.kv_heads, -1, shape.head_dim)
            scores = torch.einsum("hgd,khd->hgk", query, keys[:visible]) * shape.head_dim**-0.5
            result = torch.einsum("hgk,khd->hgd", scores.softmax(-1), values[:visible])
            actual.append(case.out[row])
            expected.append(result.view(shape.heads, shape.head_dim))
    return relative_error(torch.stack(actual), torch.stack(expected))


def _baselines(watch: Stopwatch, shape: AttentionShape) -> dict[str, float]:
    """torch's SDPA over contiguous keys and values, where it takes the shape without padding."""
    if len(set(shape.context_lens)) > 1 or shape.cache != "bfloat16":
        return {}
    sequences, context = len(shape.context_lens), shape.context_lens[0]
    dtype = torch.bfloat16 if watch.device.type == "cuda" else torch.float32

    def normal(heads: int, length: int) -> torch.Tensor:
        return torch.randn(
            sequences, heads, length, shape.head_dim, device=watch.device, dtype=dtype
        )

    query = normal(shape.heads, shape.new_tokens)
    key, value = normal(shape.kv_heads, context), normal(shape.kv_heads, context)
    causal = shape.new_tokens == context and context > 1

    def sdpa() -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=True
        )

    return {"SDPA": watch.time([sdpa]).seconds}
