"""Runs the parts of the benchmark and prints and writes what came out."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

from kvrelay_bench.machine import describe_machine
from kvrelay_bench.report import Table, write_report
from kvrelay_bench.router.measure import Measurement, evaluate
from kvrelay_bench.router.stack import Cores, running_router
from kvrelay_bench.router.workload import Workload, text_tokens
from kvrelay_protocol.errors import UsageError
from kvrelay_protocol.model_files import resolve_model
from kvrelay_router.text.served_model import ServedModel, load_served_model

_WARMUP_S = 1.0
_PREFILL_S = 0.004


def run(values: SimpleNamespace) -> int:
    """Measure; returns 1 where a request failed or a token is missing.

    Raises:
        UsageError: the model can't serve these requests, or its tokens can't be told apart.
    """
    model = resolve_model(values.model, weights=False)
    table = _check(values, load_served_model(model.directory, model.name))
    cores = Cores.choose(values.core)
    measured: list[Measurement] = []
    for workload in workloads(values):
        # A process for each, so that the one measured has its core for itself.
        with running_router(model, table, cores, floor=workload.name == "floor") as stack:
            measured.append(evaluate(workload, stack.measure(workload)))
        print(describe(measured[-1]), flush=True)
    print(f"\n{_table(measured).text()}")
    rows = [dict(_row(result)) for result in measured]
    path = write_report("router", values, rows, describe_machine(), values.out)
    print(f"\nwritten to {path}")
    return 1 if any(result.errors or result.lost_tokens for result in measured) else 0


def _check(values: SimpleNamespace, model: ServedModel) -> list[int]:
    """The tokens that mock workers answer with, once it is sure that every request will be served."""
    table = text_tokens(model.tokenizer)
    if not table:
        raise UsageError(f"--model {model.name} has no token that is printable text by itself")
    if model.template is None:
        raise UsageError(f"--model {model.name} has no chat template")
    for workload in workloads(values):
        messages = [{"role": "user", "content": workload.prompt(0)}]
        prompt = model.tokenizer.encode(model.template.render(messages), add_special_tokens=False)
        # Other prompts have other words: twice the first one's tokens is room enough for any.
        needed = 2 * len(prompt) + workload.tokens
        if needed > model.max_model_len:
            raise UsageError(
                f"the {workload.name} part needs a context of {needed} tokens, {model.name} has "
                f"{model.max_model_len}: lower --stream-tokens, --tokens or --prompt-words"
            )
    return table


def workloads(values: SimpleNamespace) -> Iterator[Workload]:
    """What the flags ask for, in the order of the rounds."""
    for _ in range(values.rounds):
        for part in (_latency, _floor, _paced, _saturated):
            if values.only is None or part.__name__ == f"_{values.only}":
                yield part(values)


def _latency(values: SimpleNamespace) -> Workload:
    warmup = int(min(_WARMUP_S, values.duration / 2) * values.rate)
    return Workload(
        name="latency",
        requests=warmup + max(1, int(values.duration * values.rate)),
        warmup=warmup,
        rate=values.rate,
        tokens=values.tokens,
        step_s=values.step,
        prefill_s=_PREFILL_S,
        path=values.path,
        prompt_words=values.prompt_words,
        seed=values.seed,
    )


def _floor(values: SimpleNamespace) -> Workload:
    """The latency part once more, through the router's libraries alone."""
    return replace(_latency(values), name="floor", path="disaggregated")


def _paced(values: SimpleNamespace) -> Workload:
    # As long as the saturated part has tokens for, but no longer than the latency part takes.
    steps = min(values.stream_tokens, max(2, int(values.duration / values.step)))
    return _streams(values, "paced", values.step, steps)


def _saturated(values: SimpleNamespace) -> Workload:
    return _streams(values, "saturated", 0.0, values.stream_tokens)


def _streams(values: SimpleNamespace, name: str, step_s: float, tokens: int) -> Workload:
    return Workload(
        name=name,
        requests=values.streams,
        rate=0.0,
        tokens=tokens,
        step_s=step_s,
        prefill_s=_PREFILL_S,
        path="local",
        prompt_words=values.prompt_words,
        seed=values.seed,
        gate=values.streams,
    )


def describe(result: Measurement) -> str:
    """One line as soon as a part is done."""
    line = (
        f"{result.name}: {result.requests} requests, {result.errors} errors, "
        f"{result.lost_tokens} lost tokens, {result.tokens_per_s:.0f} tokens/s"
    )
    return f"{line}; first error: {result.first_error}" if result.first_error else line


def _table(measured: list[Measurement]) -> Table:
    header = ["part", "added p50", "p95", "p99 ms", "relay p50", "p99 ms", "tokens/s",
              "CPU us/token", "CPU us/request", "router CPU", "tokens/CPU s", "tokens/read",
              "tokens/event", "errors", "lost"]  # fmt: skip
    return Table(header, [_cells(result) for result in measured])


def _cells(result: Measurement) -> list[object]:
    added, relay = result.added_ms, result.relay_ms
    return [
        result.name,
        added and added.median,
        added and added.p95,
        added and added.p99,
        relay and relay.median,
        relay and relay.p99,
        result.tokens_per_s,
        result.cpu_us_per_token if added is None else None,
        result.cpu_us_per_request,
        f"{result.router_cpu_s / result.seconds:.0%}",
        result.tokens_per_cpu_s if added is None else None,
        result.tokens_per_read,
        result.tokens_per_event,
        result.errors,
        result.lost_tokens,
    ]


def _row(result: Measurement) -> Iterator[tuple[str, object]]:
    for name in result.__slots__:
        value = getattr(result, name)
        # JSON has no NaN.
        yield name, None if isinstance(value, float) and value != value else value  # noqa: PLR0124
