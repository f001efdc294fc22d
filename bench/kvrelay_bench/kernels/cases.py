"""What is measured: ops at the shapes of a model's layers, with their bytes and operations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from kvrelay_bench.models import MODELS, ModelShape
from kvrelay_kernels.layout import attention_layout
from kvrelay_kernels.linear import linear, pack_linear
from kvrelay_kernels.paged_attention import paged_attention
from kvrelay_kernels.reference.paged_attention import paged_attention_reference
from kvrelay_kernels.reference.rms_norm import add_rms_norm_reference, rms_norm_reference
from kvrelay_kernels.reference.rotary_kv_write import rotary_kv_write_reference
from kvrelay_kernels.reference.silu_mul import silu_mul_reference
from kvrelay_kernels.rms_norm import add_rms_norm, rms_norm
from kvrelay_kernels.rotary_kv_write import rotary_kv_write
from kvrelay_kernels.silu_mul import silu_mul

Call = Callable[[], torch.Tensor]

BLOCK_SIZE = 16
_PROMPT_ROWS = 128


@dataclass(frozen=True, slots=True)
class Calls:
    """One op on several sets of inputs, to be called in turn, compiled and in torch."""

    rows: int
    """Of each of them."""
    native: Sequence[Call]
    torch: Sequence[Call] = ()
    """Empty: torch has no such op."""


@dataclass(frozen=True, slots=True)
class Case:
    """An op at one shape."""

    op: str
    shape: str
    nbytes: int
    """What a call has to read and write, each byte once."""
    flops: int
    """Multiplications and additions of a call."""
    rotating_bytes: int
    """Of the inputs that differ between layers: weights and KV."""
    make: Callable[[int], Calls]
    """Builds so many sets of inputs."""


def plan(only: str = "all", *, smoke: bool = False) -> list[Case]:
    """The cases of one part, or of all."""
    parts = {"attention": _attention, "linear": _linear, "elementwise": _elementwise}
    return [
        case
        for name, cases in parts.items()
        if only in {"all", name}
        for case in cases(smoke=smoke)
    ]


def _attention(*, smoke: bool) -> list[Case]:
    if smoke:
        return [attention_case("decode", MODELS["tiny"], [1, 1], [40, 300])]
    model, small = MODELS["0.5b"], MODELS["135m"]
    wide = ModelShape(4096, 1, 32, 8, 128, 14336, 128)
    mixed = [8192, *[256] * 15]
    return [
        *(
            attention_case("decode", shape, [1] * batch, [context] * batch)
            for shape, batch, context in (
                (model, 1, 128),
                (model, 1, 4096),
                (model, 8, 1024),
                (model, 32, 1024),
                (small, 8, 1024),
                (wide, 8, 1024),
            )
        ),
        attention_case("decode", model, [1] * len(mixed), mixed),
        *(
            attention_case("prefill", shape, [tokens], [context])
            for shape, tokens, context in (
                (model, 128, 128),
                (model, 1024, 1024),
                (model, 512, 4096),
                (wide, 1024, 1024),
            )
        ),
    ]


def attention_case(
    kind: str, model: ModelShape, query_lens: Sequence[int], context_lens: Sequence[int]
) -> Case:
    """Attention of one layer over a bfloat16 cache in shuffled blocks."""
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    tokens = sum(query_lens)
    pairs = sum(
        sum(range(context - new + 1, context + 1))
        for new, context in zip(query_lens, context_lens, strict=True)
    )
    kv_bytes = 2 * sum(context_lens) * kv_heads * head_dim * 2

    def make(count: int) -> Calls:
        blocks = [-(-context // BLOCK_SIZE) for context in context_lens]
        order, start = torch.randperm(sum(blocks)).int(), 0
        tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        for row, own in enumerate(blocks):
            tables[row, :own] = order[start : start + own]
            start += own
        layout = attention_layout(tables, query_lens, context_lens)
        pools = [
            _noise(2, sum(blocks), BLOCK_SIZE, kv_heads, head_dim).bfloat16() for _ in range(count)
        ]
        query, scale = torch.randn(tokens, heads, head_dim), head_dim**-0.5
        ours = partial(paged_attention, query, scale=scale, out=torch.empty_like(query))
        plain = partial(
            paged_attention_reference,
            query,
            scale=scale,
            sliding_window=None,
            soft_cap=None,
            out=torch.empty_like(query),
        )
        return Calls(
            tokens,
            [partial(ours, keys, values, layout) for keys, values in pools],
            [partial(plain, keys, values, layout) for keys, values in pools],
        )

    return Case(
        f"{kind} attention",
        f"{heads}/{kv_heads}x{head_dim}, {_grouped(query_lens, context_lens)}",
        kv_bytes + 2 * tokens * heads * head_dim * 4,
        4 * pairs * heads * head_dim,
        # The multiplications of a prompt take longer than reading its KV from anywhere.
        kv_bytes if kind == "decode" else 0,
        make,
    )


def _noise(*shape: int) -> torch.Tensor:
    """Speed does not depend on the numbers, and drawing them all takes longer than a measurement."""
    drawn = torch.randn(min(torch.Size(shape).numel(), 1 << 16))
    return drawn.repeat(-(-torch.Size(shape).numel() // len(drawn)))[
        : torch.Size(shape).numel()
    ].view(shape)


def _grouped(query_lens: Sequence[int], context_lens: Sequence[int]) -> str:
    """`8 x 1 of 1024` for eight sequences with one new token and 1,024 in all."""
    pairs = list(zip(query_lens, context_lens, strict=True))
    return " + ".join(
        f"{pairs.count(pair)} x {pair[0]} of {pair[1]}" for pair in dict.fromkeys(pairs)
    )


def _linear(*, smoke: bool) -> list[Case]:
    if smoke:
        return [linear_case(2, 64, 96, torch.bfloat16), linear_case(3, 64, 96, torch.int8)]
    model = MODELS["0.5b"]
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return [
        linear_case(rows, width, outputs, dtype)
        for width, outputs, batches in (
            (model.hidden_size, qkv, (1, 8, 32, 512)),
            (model.hidden_size, 2 * model.intermediate_size, (1, 8, 32, 512)),
            (model.intermediate_size, model.hidden_size, (1, 8, 32, 512)),
            # Of the head, only the last token of each sequence.
            (model.hidden_size, model.vocab_size, (1, 8, 32)),
        )
        for dtype in (torch.bfloat16, torch.int8)
        for rows in batches
    ]


def linear_case(rows: int, width: int, outputs: int, dtype: torch.dtype) -> Case:
    """One projection; torch computes it in the dtype of the weights, and not at all in int8."""
    weight_bytes = width * outputs * dtype.itemsize

    def make(count: int) -> Calls:
        x = torch.randn(rows, width)
        plain = [_noise(outputs, width).mul_(width**-0.5).bfloat16() for _ in range(count)]
        packed = [pack_linear([part], device=x.device, dtype=dtype) for part in plain]
        ours = partial(linear, x, out=torch.empty(rows, outputs))
        theirs = partial(functional.linear, x.bfloat16()) if dtype == torch.bfloat16 else None
        return Calls(
            rows,
            [partial(ours, weights) for weights in packed],
            [partial(theirs, weights) for weights in plain] if theirs else (),
        )

    name = str(dtype).removeprefix("torch.")
    return Case(
        "linear",
        f"{rows} x {width} -> {outputs}, {name}",
        weight_bytes + 4 * rows * (width + outputs),
        2 * rows * width * outputs,
        # The multiplications of a prompt take longer than reading the weights from anywhere.
        weight_bytes if rows < _PROMPT_ROWS else 0,
        make,
    )


def _elementwise(*, smoke: bool) -> list[Case]:
    sizes = (2,) if smoke else (1, 32, 1024)
    model = MODELS["tiny" if smoke else "0.5b"]
    return [
        make(rows, model)
        for make in (_rms_norm, _add_rms_norm, _silu_mul, _rotary)
        for rows in sizes
    ]


def _rms_norm(rows: int, model: ModelShape) -> Case:
    width = model.hidden_size

    def make(_count: int) -> Calls:
        x, weight = torch.randn(rows, width), torch.rand(width)
        native, plain = torch.empty_like(x), torch.empty_like(x)
        return Calls(
            rows,
            [lambda: rms_norm(x, weight, 1e-5, out=native)],
            [lambda: rms_norm_reference(x, weight, 1e-5, out=plain)],
        )

    return Case("rms_norm", f"{rows} x {width}", 8 * rows * width, 4 * rows * width, 0, make)


def _add_rms_norm(rows: int, model: ModelShape) -> Case:
    width = model.hidden_size

    def make(_count: int) -> Calls:
        # Added again in every call: zeros keep the numbers where they are.
        x, weight, residual = torch.zeros(rows, width), torch.rand(width), torch.randn(rows, width)
        native, plain = torch.empty_like(x), torch.empty_like(x)
        return Calls(
            rows,
            [lambda: add_rms_norm(x, residual, weight, 1e-5, out=native)],
            [lambda: add_rms_norm_reference(x, residual, weight, 1e-5, out=plain)],
        )

    return Case("add_rms_norm", f"{rows} x {width}", 16 * rows * width, 5 * rows * width, 0, make)


def _silu_mul(rows: int, model: ModelShape) -> Case:
    width = model.intermediate_size

    def make(_count: int) -> Calls:
        gate_up = torch.randn(rows, 2 * width)
        native, plain = torch.empty(rows, width), torch.empty(rows, width)
        return Calls(
            rows,
            [lambda: silu_mul(gate_up, out=native)],
            [lambda: silu_mul_reference(gate_up, out=plain)],
        )

    return Case("silu_mul", f"{rows} x {width}", 12 * rows * width, 20 * rows * width, 0, make)


def _rotary(rows: int, model: ModelShape) -> Case:
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    packed = heads + 2 * kv_heads

    def make(_count: int) -> Calls:
        # Turned again in every call, which changes no length.
        qkv, theta = torch.randn(rows, packed, head_dim), torch.randn(rows, head_dim // 2)
        plain_qkv = qkv.clone()
        shape = (2, rows, 1, kv_heads, head_dim)
        caches, plain_caches = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
        slots, cos, sin = torch.randperm(rows), theta.cos(), theta.sin()

        def native() -> torch.Tensor:
            rotary_kv_write(qkv, caches[0], caches[1], slots, cos, sin)
            return caches

        def plain() -> torch.Tensor:
            rotary_kv_write_reference(
                plain_qkv,
                plain_caches[0],
                plain_caches[1],
                slots,
                cos,
                sin,
                query_norm=None,
                key_norm=None,
                eps=0.0,
            )
            return plain_caches

        return Calls(rows, [native], [plain])

    numbers = rows * head_dim * (2 * heads + 2 * kv_heads)
    return Case(
        "rotary_kv_write",
        f"{rows} x {heads}/{kv_heads}x{head_dim}",
        4 * numbers + 2 * rows * head_dim * 2 * kv_heads,
        6 * rows * head_dim * (heads + kv_heads),
        0,
        make,
    )
