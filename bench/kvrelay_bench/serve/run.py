"""`kvrelay bench serve` from values to report."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvrelay_bench.machine import describe_machine
from kvrelay_bench.report import Table, write_report
from kvrelay_bench.serve.client import CompletionClient, Outcome
from kvrelay_bench.serve.load import Load, LoadRun
from kvrelay_bench.serve.metrics import LATENCIES, Point, measure, requests_of
from kvrelay_bench.serve.stack import Target, fetch_target, own_stack, stop_on_signal
from kvrelay_bench.serve.traces import read_trace
from kvrelay_bench.serve.workload import (
    PlannedRequest,
    Prompts,
    clip,
    completion_body,
    poisson,
    synthetic,
)
from kvrelay_protocol.errors import UsageError

DEFAULT_RATE = 2.0
_WARMUP_NUMBER = 1_000_000_000
_WARMUP_TOKENS = 8
_WARMUP_USERS = 4


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """One run of the sweep."""

    name: str
    requests: Sequence[PlannedRequest]
    users: int | None = None
    """Of a closed loop; None sends at the requests' arrival times."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A run and its numbers."""

    point: Point
    run: LoadRun

    def row(self) -> dict[str, Any]:
        return {**asdict(self.point), "requests": requests_of(self.run)}


def run_serve(values: SimpleNamespace) -> int:
    """Measure, print, write; returns the exit code: 1 when no request ended well, 130 interrupted.

    Raises:
        UsageError: flags that exclude each other, an unreadable trace, a server without models.
        StartupError: the stack can't start.
    """
    from kvrelay.cli.reply import exit_on_sigterm

    _check(values)
    if values.plot is not None:
        from kvrelay_bench.plot import require_matplotlib

        require_matplotlib()
    exit_on_sigterm()
    requests = plan_requests(values)
    with (
        nullcontext(_remote(values)) if values.base_url else own_stack(values) as target,
        asyncio.Runner(loop_factory=_loop_factory()) as runner,
    ):
        print(f"{target.model} at {target.base_url}", flush=True)
        loads = plan_loads(values, _fit(requests, values, target))
        measured = runner.run(measure_loads(values, target, loads))
    if len(measured) > 1:
        print(f"\n{summary_table([m.point for m in measured]).text()}")
    if values.plot is not None and measured:
        from kvrelay_bench.serve.charts import draw

        runs = {m.point.load: m.run for m in measured}
        draw(values.plot, runs, title=f"kvrelay bench serve: {target.model}")
        print(f"plot: {values.plot}")
    if any(m.point.interrupted for m in measured):
        return 130
    return 0 if any(m.point.outcomes.get(Outcome.OK) for m in measured) else 1


def _check(values: SimpleNamespace) -> None:
    if values.rate and values.concurrency:
        raise UsageError("--rate (open loop) and --concurrency (closed loop) exclude each other")
    if values.base_url and values.model:
        raise UsageError(
            "--model starts a stack, --base-url measures a running one; its model is named with "
            "--served-model-name"
        )


def _remote(values: SimpleNamespace) -> Target:
    return fetch_target(
        values.base_url,
        api_key=values.api_key,
        model=values.served_model_name,
        vocabulary=values.vocab_size,
    )


def plan_requests(values: SimpleNamespace) -> list[PlannedRequest]:
    """Lengths, and arrivals where a trace has them."""
    if values.trace is None:
        return synthetic(values.requests, values.input_len, values.output_len, seed=values.seed)
    return read_trace(
        values.trace,
        limit=values.limit,
        speed_up=values.speed_up,
        divide=values.divide_lengths,
    )


def _fit(
    requests: Sequence[PlannedRequest], values: SimpleNamespace, target: Target
) -> list[PlannedRequest]:
    asked = clip(requests, max_input=values.max_input_len, max_output=values.max_output_len)
    fitted = clip(asked.requests, max_context=target.max_context)
    for count, reason in (
        (asked.cut, "--max-input-len and --max-output-len"),
        (fitted.cut, f"the server's context of {target.max_context} tokens"),
    ):
        if count:
            print(f"{count} of {len(requests)} requests were cut to {reason}", flush=True)
    return fitted.requests


def plan_loads(values: SimpleNamespace, requests: Sequence[PlannedRequest]) -> list[PlannedLoad]:
    """One run for each rate or number of users; else the trace as it is."""
    if values.concurrency:
        return [PlannedLoad(f"{users} users", requests, users) for users in values.concurrency]
    if values.rate or values.trace is None:
        return [
            PlannedLoad(f"{rate:g}/s Poisson", poisson(requests, rate, seed=values.seed))
            for rate in values.rate or (DEFAULT_RATE,)
        ]
    name = f"trace {values.trace.name}"
    if values.speed_up != 1:
        name += f", {values.speed_up:g}x as fast"
    if values.divide_lengths != 1:
        name += f", lengths / {values.divide_lengths:g}"
    return [PlannedLoad(name, requests)]


async def measure_loads(
    values: SimpleNamespace, target: Target, loads: Sequence[PlannedLoad]
) -> list[Measured]:
    """Run all loads one after the other; what is there is on disk after each."""
    client = CompletionClient(target.base_url, api_key=values.api_key, timeout_s=values.timeout)
    measured: list[Measured] = []
    out = Path(values.out) if values.out else None
    try:
        with stop_on_signal() as stop:
            for index, planned in enumerate(loads):
                # A salt of its own: no run finds what another one left in the prefix cache.
                encode = _encoder(target, values.seed, salt=secrets.token_hex(8))
                load = Load(client, encode, stop=stop, say=_say)
                if index == 0:
                    await _warm_up(load, planned.requests[: values.warmup])
                if stop.is_set():
                    break
                _say(f"\n{planned.name}: {len(planned.requests)} requests")
                run = await (
                    load.open_loop(planned.requests)
                    if planned.users is None
                    else load.closed_loop(planned.requests, planned.users)
                )
                measured.append(Measured(measure(planned.name, run, values.slo), run))
                _say(describe(measured[-1]))
                out = _write(values, target, measured, out)
    finally:
        client.close()
    if out is not None and measured:
        _say(f"\nresult: {out}")
    return measured


def _encoder(target: Target, seed: int, *, salt: str) -> Callable[[PlannedRequest], bytes]:
    prompts = Prompts(target.vocabulary, seed=seed)

    def encode(request: PlannedRequest) -> bytes:
        prompt = prompts.tokens(request)
        return completion_body(target.model, prompt, request.output_tokens, salt=salt)

    return encode


async def _warm_up(load: Load, requests: Sequence[PlannedRequest]) -> None:
    """Prompts of the same lengths, but none that the run will ask again.

    Raises:
        UsageError: the server answered none of them; it would not answer the others either.
    """
    if not requests:
        return
    warm = [
        PlannedRequest(
            _WARMUP_NUMBER + index, 0.0, r.input_tokens, min(r.output_tokens, _WARMUP_TOKENS)
        )
        for index, r in enumerate(requests)
    ]
    run = await load.closed_loop(warm, _WARMUP_USERS)
    if run.interrupted or any(s.answer.outcome is Outcome.OK for s in run.samples):
        return
    raise UsageError(f"the server answered no warm-up request: {run.samples[0].answer.problem}")


def describe(measured: Measured) -> str:
    """One load's numbers, for people."""
    point = measured.point
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(point.outcomes.items()))
    cached = point.cached_prompt_share
    lines = [
        f"  {point.sent} requests in {point.seconds:.1f} s: {counts or 'none ended'}",
        f"  output {point.output_tokens_per_s:.1f} tokens/s, with prompts "
        f"{point.total_tokens_per_s:.1f}; {point.request_rate:.2f} requests/s"
        + (f"; {cached:.0%} of prompt tokens cached" if cached is not None else ""),
    ]
    if point.goodput is not None and point.good is not None:
        lines.append(
            f"  goodput {point.goodput:.2f} requests/s, {point.good} of {point.sent} "
            f"({point.objectives})"
        )
    lines += ["", _indented(latency_table(point).text()), ""]
    lag = point.client_lag
    lines.append(
        f"  client: {point.client_cpu_share:.1%} of a core"
        + (f", {point.client_us_per_chunk:.0f} us a chunk" if point.client_us_per_chunk else "")
        + (f"; sent late by p50 {lag.p50 * 1e3:.1f}, p99 {lag.p99 * 1e3:.1f} ms" if lag else "")
    )
    lines += [f"  note: {warning}" for warning in point.warnings]
    problems = dict.fromkeys(s.answer.problem for s in measured.run.samples if s.answer.problem)
    lines += [f"  failure: {problem}" for problem in list(problems)[:3]]
    return "\n".join(lines)


def latency_table(point: Point) -> Table:
    rows: list[list[object]] = []
    for name in LATENCIES:
        found = point.latencies[name]
        values = (found.p50, found.p95, found.p99, found.maximum) if found else (None,) * 4
        cells: list[object] = [None if value is None else value * 1e3 for value in values]
        rows.append([name.upper(), *cells, found.count if found else 0])
    return Table(("milliseconds", "p50", "p95", "p99", "max", "values"), rows)


def summary_table(points: Sequence[Point]) -> Table:
    """A line for each load of a sweep."""
    header = ("load", "ok/sent", "out tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99",
              "TPOT p50", "good/s")  # fmt: skip
    rows: list[list[object]] = []
    for point in points:
        cells: list[object] = []
        for name, field in (("ttft", "p50"), ("ttft", "p99"), ("itl", "p50"), ("itl", "p99"),
                            ("tpot", "p50")):  # fmt: skip
            found = point.latencies[name]
            cells.append(None if found is None else float(getattr(found, field)) * 1e3)
        ok = f"{point.outcomes.get(Outcome.OK, 0)}/{point.sent}"
        rows.append([point.load, ok, point.output_tokens_per_s, *cells, point.goodput])
    return Table(header, rows)


def _indented(block: str) -> str:
    return "\n".join(f"  {line}" for line in block.splitlines())


def _write(
    values: SimpleNamespace, target: Target, measured: Sequence[Measured], out: Path | None
) -> Path:
    arguments = {name: value for name, value in vars(values).items() if name != "api_key"}
    return write_report(
        "serve",
        {name: _plain(value) for name, value in arguments.items()},
        [m.row() for m in measured],
        describe_machine(),
        out,
        details={"served_model": target.model, "max_context": target.max_context},
    )


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | None | tuple) else str(value)


def _say(line: str) -> None:
    print(line, flush=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Uvloop where it is installed: the client shares its cores with the server."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
