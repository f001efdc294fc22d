"""The small ops at the widths of an 8B model, and the projections beside cuBLAS."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from kvrelay_bench.gpu.timing import Call, Stopwatch, poisoned, relative_error
from kvrelay_bench.gpu.work import Ceilings, Job, ModelShape, Plan, Row, rotations
from kvrelay_kernels import sampling
from kvrelay_kernels.kv_gather import kv_digest, kv_gather_digest
from kvrelay_kernels.linear import linear, pack_linear
from kvrelay_kernels.rms_norm import add_rms_norm
from kvrelay_kernels.rotary_kv_write import rotary_kv_write
from kvrelay_kernels.silu_mul import silu_mul

_BLOCK = 16


@dataclass(frozen=True, slots=True)
class _Op:
    """One op on inputs of its own: the timed call, and a check that runs it once more."""

    call: Call
    check: Callable[[], float]
    """Error against float64, or 0 and 1 for results that must be equal."""


@dataclass(frozen=True, slots=True)
class _Measured:
    name: str
    shape: str
    nbytes: int
    make: Callable[[], _Op]
    flops: int = 0
    tolerance: float = 1e-2


def op_jobs(watch: Stopwatch, plan: Plan, ceilings: Ceilings) -> Iterator[Job]:
    """One job for each op and number of rows, then the transfer's copy and the projections."""
    for measured in _all_measured(plan, watch.device):
        run = partial(_measure, watch, measured, ceilings)
        yield Job("ops", measured.name, measured.shape, run)


def _all_measured(plan: Plan, device: torch.device) -> Iterator[_Measured]:
    for rows in plan.op_rows:
        yield from _small_ops(plan.model, rows, device)
    yield _gather(plan, device)
    for rows in plan.gemm_rows:
        yield from _projections(plan.model, rows, device)


def _measure(watch: Stopwatch, measured: _Measured, ceilings: Ceilings) -> Row:
    sets = [measured.make() for _ in range(rotations(measured.nbytes, ceilings.l2_bytes))]
    timed = watch.time([op.call for op in sets])
    return Row(
        "ops",
        measured.name,
        measured.shape,
        nbytes=measured.nbytes,
        flops=measured.flops,
        seconds=timed.seconds,
        eager_seconds=timed.eager,
        floor_seconds=ceilings.floor_s(measured.nbytes, measured.flops),
        error=sets[0].check(),
        tolerance=measured.tolerance,
    )


def _activations(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _normal(device: torch.device, *size: int) -> torch.Tensor:
    return torch.randn(*size, device=device).to(_activations(device))


def _small_ops(model: ModelShape, rows: int, device: torch.device) -> Iterator[_Measured]:
    item = _activations(device).itemsize
    hidden, inner = model.hidden, model.intermediate
    heads = model.heads + 2 * model.kv_heads
    yield _Measured(
        "add_rms_norm", f"{rows} x {hidden}", (4 * rows + 1) * hidden * item,
        lambda: _add_rms_norm(rows, hidden, device),
    )  # fmt: skip
    yield _Measured(
        "silu_mul", f"{rows} x {inner}", 3 * rows * inner * item,
        lambda: _silu_mul(rows, inner, device),
    )  # fmt: skip
    yield _Measured(
        "rotary_kv_write", f"{rows} x {heads} heads", 2 * rows * heads * model.head_dim * item,
        lambda: _rotary(model, rows, device),
    )  # fmt: skip
    if rows > 1024:
        return
    logits = rows * model.vocabulary * 4
    yield _Measured(
        "greedy", f"{rows} x {model.vocabulary}", logits,
        lambda: _greedy(model, rows, device), tolerance=0.0,
    )  # fmt: skip
    for name, filtered in (("sample", False), ("sample, top-k and top-p", True)):
        yield _Measured(
            name, f"{rows} x {model.vocabulary}", logits,
            partial(_sample, model, rows, device, filtered=filtered),
            tolerance=0.0,
        )  # fmt: skip


def _add_rms_norm(rows: int, hidden: int, device: torch.device) -> _Op:
    x, residual, weight = (
        _normal(device, rows, hidden), _normal(device, rows, hidden), _normal(device, hidden)
    )  # fmt: skip
    out = poisoned(x)

    def check() -> float:
        total = (residual + x).double()
        expected = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
        out.fill_(float("nan"))
        return relative_error(add_rms_norm(x, residual, weight, 1e-5, out=out), expected)

    return _Op(lambda: add_rms_norm(x, residual, weight, 1e-5, out=out), check)


def _silu_mul(rows: int, inner: int, device: torch.device) -> _Op:
    gate_up = _normal(device, rows, 2 * inner)
    out = torch.empty(rows, inner, dtype=gate_up.dtype, device=device)

    def check() -> float:
        gate, up = gate_up.double().chunk(2, dim=-1)
        out.fill_(float("nan"))
        return relative_error(silu_mul(gate_up, out=out), gate * gate.sigmoid() * up)

    return _Op(lambda: silu_mul(gate_up, out=out), check)


def _rotary(model: ModelShape, rows: int, device: torch.device) -> _Op:
    dim, kv_heads = model.head_dim, model.kv_heads
    qkv = _normal(device, rows, model.heads + 2 * kv_heads, dim)
    blocks = -(-rows // _BLOCK) + 1
    key, value = (poisoned(_normal(device, blocks, _BLOCK, kv_heads, dim)) for _ in range(2))
    slots = torch.randperm(blocks * _BLOCK, device=device)[:rows]
    theta = torch.randn(rows, dim // 2, device=device)
    cos, sin = theta.cos(), theta.sin()

    def run() -> None:
        rotary_kv_write(qkv, key, value, slots, cos, sin)

    def check() -> float:
        before = qkv.double()
        first, second = before.chunk(2, dim=-1)
        c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
        turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
        run()
        written = [cache.view(-1, kv_heads, dim)[slots] for cache in (key, value)]
        actual = torch.cat((qkv[:, : model.heads], *written), dim=1)
        expected = torch.cat((turned[:, : model.heads + kv_heads], before[:, -kv_heads:]), dim=1)
        return relative_error(actual, expected)

    return _Op(run, check)


def _greedy(model: ModelShape, rows: int, device: torch.device) -> _Op:
    logits = torch.randn(rows, model.vocabulary, device=device)

    def check() -> float:
        return float(sampling.greedy(logits).tolist() != logits.argmax(-1).tolist())

    return _Op(lambda: sampling.greedy(logits), check)


def _sample(model: ModelShape, rows: int, device: torch.device, *, filtered: bool) -> _Op:
    from kvrelay_kernels.reference.sampling import sample_reference

    logits = torch.randn(rows, model.vocabulary, device=device) * 3

    def column(value: float) -> torch.Tensor:
        return torch.full((rows,), value, dtype=torch.float64, device=device)

    given = {
        "temperature": column(0.8),
        "top_k": torch.full((rows,), 50 if filtered else 0, device=device),
        "top_p": column(0.95 if filtered else 1.0),
        "min_p": column(0.0),
        "uniform": torch.rand(rows, dtype=torch.float64, device=device),
    }

    def check() -> float:
        # The same token as the CPU, for every row: the draw is exact on both.
        expected = sample_reference(logits.cpu(), **{k: v.cpu() for k, v in given.items()})
        return float(sampling.sample(logits, **given).tolist() != expected.tolist())

    return _Op(lambda: sampling.sample(logits, **given), check)


def _gather(plan: Plan, device: torch.device) -> _Measured:
    """One message of 64 MiB in the full plan: 4 layers of a 4k prompt."""
    model = plan.model
    tokens = 4096 if plan.gemm_size > 1024 else 64
    blocks = tokens // _BLOCK
    shape = (4, 2, 2 * blocks, _BLOCK, model.kv_heads, model.head_dim)

    def make() -> _Op:
        pool = _normal(device, *shape)
        chosen = torch.randperm(2 * blocks, device=device)[:blocks]
        out = torch.empty(4, 2, blocks, *shape[3:], dtype=pool.dtype, device=device)

        def check() -> float:
            out.fill_(float("nan"))
            digest = kv_gather_digest(pool, chosen, out)
            same = torch.equal(out, pool[:, :, chosen]) and digest == kv_digest(out)
            return float(not same)

        from kvrelay_kernels.kv_gather import gather_and_sum

        return _Op(lambda: gather_and_sum(pool, chosen, out), check)

    nbytes = 2 * 4 * 2 * tokens * model.kv_heads * model.head_dim * _activations(device).itemsize
    return _Measured("kv_gather and digest", f"4 layers, {tokens} tokens", nbytes, make,
                     tolerance=0.0)  # fmt: skip


def _projections(model: ModelShape, rows: int, device: torch.device) -> Iterator[_Measured]:
    for name, outputs, width in (
        ("qkv", (model.heads + 2 * model.kv_heads) * model.head_dim, model.hidden),
        ("gate_up", 2 * model.intermediate, model.hidden),
        ("down", model.hidden, model.intermediate),
    ):
        item = 2
        nbytes = (outputs * width + rows * (outputs + width)) * item
        yield _Measured(
            f"linear, {name}", f"{rows} x {width} x {outputs}", nbytes,
            partial(_linear, rows, outputs, width, device),
            flops=2 * rows * outputs * width,
        )  # fmt: skip


def _linear(rows: int, outputs: int, width: int, device: torch.device) -> _Op:
    weight = (torch.randn(outputs, width, device=device) * 0.02).bfloat16()
    packed = pack_linear([weight], device=device, dtype=torch.bfloat16)
    x = _normal(device, rows, width)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=device)

    def check() -> float:
        out.fill_(float("nan"))
        actual = linear(x, packed, out=out)
        # Every column of some rows: the whole in float64 would take longer than the rest.
        some = slice(0, min(rows, 16))
        return relative_error(actual[some], x[some].double() @ weight.double().T)

    return _Op(lambda: linear(x, packed, out=out), check)
