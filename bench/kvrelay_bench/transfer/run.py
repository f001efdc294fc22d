"""`kvrelay bench transfer` from values to report."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from kvrelay.cli.units import format_size
from kvrelay_bench.machine import StolenTime, describe_machine
from kvrelay_bench.report import Table, percentile, write_report
from kvrelay_bench.transfer.perftest import find_perftest, run_perftest
from kvrelay_bench.transfer.pieces import piece_of
from kvrelay_bench.transfer.stages import Stages
from kvrelay_protocol.errors import TransferError, UsageError
from kvrelay_transfer.frames import HEADER_SIZE
from kvrelay_transfer.probe import probe
from kvrelay_transfer.ucx_env import UcxOptions, ucx_config

_STAGES = ("memcpy", "gather", "scatter")
_FRAMING = {"seal_us": "seal, us", "open_us": "open, us"}
"""What is done once a message, whatever its size."""
_PROCESS_LIMIT_S = 300.0
_LABELS = {
    "memcpy": "memcpy, one way",
    "gather": "gather + digest",
    "send": "send (ours)",
    "asleep": "send (ucxx, asleep)",
    "plain": "send (ucxx, polling)",
    "perftest": "send (ucx_perftest)",
    "scatter": "scatter + digest",
}
_REFERENCES = ("asleep", "plain", "perftest", "memcpy")
"""What else could move the bytes of our send."""


@dataclass(slots=True)
class Results:
    """Everything measured so far; lists grow by one value a round."""

    rates: dict[int, dict[str, list[float]]]
    """By message size, then by the names of `_LABELS`: 10^9 bytes a second."""
    framing_us: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """By message size, then by the names of `_FRAMING`: microseconds a message."""
    transport: str = ""
    """What UCX chose for our transport."""
    latency_us: list[float] = field(default_factory=list)
    plain_latency_us: list[float] = field(default_factory=list)
    prompts: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Whole hand-overs by the prompt's tokens."""
    stack: list[dict[str, Any]] = field(default_factory=list)
    """Requests to a whole stack: see `measure_stack`."""
    stolen: list[float] = field(default_factory=list)
    """The share of the processor time that the machine's host did not give."""
    rounds: int = 0
    failures: list[str] = field(default_factory=list)
    """One for each round that is left out."""

    def add(self, name: str, size: int, rate: float) -> None:
        self.rates[size].setdefault(name, []).append(rate)

    def median(self, size: int, name: str) -> float | None:
        found = self.rates[size].get(name)
        return percentile(found, 50) if found else None

    def share(self, size: int, name: str, of: str) -> float | None:
        above, below = self.median(size, name), self.median(size, of)
        return above / below if above is not None and below else None


def run_transfer(values: SimpleNamespace) -> int:
    """Measure round by round, print, write; returns the exit code.

    Raises:
        UsageError: sizes that are no whole blocks, another transport than UCX, no matplotlib.
        TransportMisconfigured: the environment forbids every usable transport.
    """
    if values.plot is not None:
        from kvrelay_bench.plot import require_matplotlib

        require_matplotlib()
    for size in values.size:
        piece_of(size)
    config = _config(values.transport)
    results = Results({size: {} for size in sorted(set(values.size))})
    out = Path(values.out) if values.out else None
    with _until_interrupted() as interruption:
        stages = Stages()
        for number in range(values.rounds):
            try:
                _round(values, config, stages, results)
            except TransferError as error:
                results.failures.append(error.message)
                _say(f"round {number + 1} of {values.rounds} failed: {error}")
                continue
            results.rounds += 1
            out = write(values, results, out)
            _say(f"round {number + 1} of {values.rounds}: {_line(results)}")
        if values.model is not None:
            from kvrelay_bench.transfer.stack import measure_stack

            results.stack = measure_stack(
                values.model, values.prompt_tokens, values.rounds, say=_say
            )
            out = write(values, results, out)
    if not results.rounds:
        return 130 if interruption.happened else 1
    _say(f"\n{describe(results)}\nresult: {out}")
    if values.plot is not None:
        from kvrelay_bench.transfer.charts import draw

        sizes = list(results.rates)
        series = {
            label: [results.median(size, name) for size in sizes] for name, label in _LABELS.items()
        }
        shown = {label: found for label, found in series.items() if any(found)}
        draw(values.plot, sizes, shown, title=f"KV between two processes, {results.transport}")
        _say(f"plot: {values.plot}")
    exact = all(found["exact"] for done in results.prompts.values() for found in done)
    if not exact:
        _say("error: a hand-over did not give the blocks that were sent")
        return 1
    return 130 if interruption.happened else 0


def _config(uri: str) -> dict[str, str]:
    """The UCX settings that our transport will use, for those without it."""
    parts = urlsplit(uri)
    if parts.scheme != "ucx":
        raise UsageError(f"--transport {uri}: only ucx:// is measured against UCX")
    return ucx_config(UcxOptions.parse(dict(parse_qsl(parts.query))))


@dataclass(slots=True)
class _Interruption:
    happened: bool = False


@contextmanager
def _until_interrupted() -> Iterator[_Interruption]:
    """Ctrl-C ends the block, and what it has left behind is the result."""
    interruption = _Interruption()
    try:
        yield interruption
    except KeyboardInterrupt:
        interruption.happened = True
        _say("interrupted: showing the rounds that have ended")


def _round(
    values: SimpleNamespace, config: dict[str, str], stages: Stages, results: Results
) -> None:
    """Everything once; added to the results only when all of it is there."""
    sizes = list(results.rates)
    stolen = StolenTime()
    apart = {size: stages.measure(size) for size in sizes}
    ours = probe(values.transport, sizes, _PROCESS_LIMIT_S)
    plain = _run_json("plain", {"sizes": sizes, "config": config, "sleeps": False})
    asleep = _run_json("plain", {"sizes": sizes, "config": config, "sleeps": True})
    binary = None if values.skip_perftest else find_perftest()
    perftest = run_perftest(binary, sizes, config) if binary else {}
    whole = _run_json("handover", {
        "uri": values.transport,
        "prompts": list(values.prompt_tokens),
        "staging_bytes": HEADER_SIZE + values.staging,
        "staging_buffers": values.staging_buffers,
    })  # fmt: skip
    results.stolen.append(stolen.share())
    results.transport = ours.transport
    results.latency_us.append(ours.latency_us)
    results.plain_latency_us.append(plain["latency_us"])
    for size in sizes:
        for name in _STAGES:
            results.add(name, size, getattr(apart[size], name))
        for name in _FRAMING:
            found_us = results.framing_us.setdefault(size, {}).setdefault(name, [])
            found_us.append(getattr(apart[size], name))
        results.add("send", size, ours.gb_per_s[size])
        results.add("plain", size, plain["gb_per_s"][str(size)])
        results.add("asleep", size, asleep["gb_per_s"][str(size)])
        if size in perftest:
            results.add("perftest", size, perftest[size])
    for found in whole["prompts"]:
        results.prompts.setdefault(found["tokens"], []).append(found)


def _run_json(module: str, order: dict[str, Any]) -> dict[str, Any]:
    """Run one of our modules as a process that reads and prints one JSON object.

    Raises:
        TransferError: it failed; its last line says why.
    """
    command = [sys.executable, "-m", f"kvrelay_bench.transfer.{module}"]
    try:
        done = subprocess.run(
            command, input=json.dumps(order) + "\n", capture_output=True, text=True, check=False,
            timeout=_PROCESS_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TransferError(f"{module} did not end within {_PROCESS_LIMIT_S:g} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TransferError(f"{module} failed: {reason}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _line(results: Results) -> str:
    largest = max(results.rates)
    last = {name: found[-1] for name, found in results.rates[largest].items()}
    shown = ("send", *_REFERENCES[:-1])
    parts = [f"{name} {last[name]:.2f}" for name in shown if name in last]
    stolen = f"{results.stolen[-1]:.0%} of the processors stolen"
    return f"GB/s at {format_size(largest)}: {', '.join(parts)}; {results.transport}; {stolen}"


def describe(results: Results) -> str:
    """All tables."""
    latency, plain = percentile(results.latency_us, 50), percentile(results.plain_latency_us, 50)
    return "\n".join(
        [
            f"UCX chose {results.transport}; medians of {results.rounds} rounds, GB/s = 10^9 bytes/s",
            f"of the processors the machine's host kept up to {max(results.stolen, default=0.0):.0%}",
            f"4 KiB one way: {latency:.0f} us, plain ucxx {plain:.0f} us",
            "",
            rate_table(results).text(),
            "",
            share_table(results).text(),
            "",
            "whole hand-overs, nothing hidden behind prefill:",
            prompt_table(results).text(),
            *(
                [
                    "",
                    "in a whole stack, behind prefill (exposed: what prefill did not hide):",
                    stack_table(results).text(),
                ]
                if results.stack
                else []
            ),
        ]
    )


def rate_table(results: Results) -> Table:
    names = [n for n in _LABELS if any(n in found for found in results.rates.values())]
    rows: list[list[object]] = [
        [
            format_size(size),
            *(results.median(size, name) for name in names),
            *(percentile(us, 50) for us in results.framing_us.get(size, {}).values()),
        ]
        for size in results.rates
    ]
    framing = _FRAMING.values() if results.framing_us else ()
    return Table(("GB/s", *(_LABELS[name] for name in names), *framing), rows)


def share_table(results: Results) -> Table:
    """Our send as a share of what else could move the bytes."""
    rows: list[list[object]] = [
        [
            format_size(size),
            *(
                None if (part := results.share(size, "send", of)) is None else f"{part:.0%}"
                for of in _REFERENCES
            ),
        ]
        for size in results.rates
    ]
    names = (_LABELS[of].removeprefix("send ").strip("()") for of in _REFERENCES)
    return Table(("our send as a share of", *names), rows)


def prompt_table(results: Results) -> Table:
    rows: list[list[object]] = []
    for tokens, done in results.prompts.items():

        def median(key: str, done: Sequence[dict[str, Any]] = done) -> float:
            return percentile([found[key] for found in done], 50)

        rows.append(
            [
                f"{tokens} tokens",
                format_size(done[0]["bytes"]),
                done[0]["messages"],
                median("seconds") * 1e3,
                median("gb_per_s"),
                median("sending_s") * 1e3,
                median("sender_cpu_s") * 1e3,
                median("receiver_cpu_s") * 1e3,
                "yes" if all(found["exact"] for found in done) else "NO",
            ]
        )
    header = ("prompt", "KV", "messages", "ms", "GB/s", "sending ms", "sender CPU ms",
              "receiver CPU ms", "exact")  # fmt: skip
    return Table(header, rows)


def stack_table(results: Results) -> Table:
    """What a request waits for, by the length of its prompt."""
    rows: list[list[object]] = []
    for tokens in dict.fromkeys(found["tokens"] for found in results.stack):
        done = [found for found in results.stack if found["tokens"] == tokens]
        ttft, transfer, exposed = (
            percentile([found[name] for found in done], 50)
            for name in ("ttft_ms", "kv_transfer_ms", "kv_exposed_ms")
        )
        share = percentile([found["kv_exposed_ms"] / found["ttft_ms"] for found in done], 50)
        size = format_size(done[0]["kv_bytes"])
        rows.append([f"{tokens} tokens", size, ttft, transfer, exposed, f"{share:.1%}"])
    header = ("prompt", "KV", "TTFT ms", "sending ms", "exposed ms", "exposed of TTFT")
    return Table(header, rows)


def write(values: SimpleNamespace, results: Results, out: Path | None) -> Path:
    rows: list[dict[str, Any]] = [
        {
            "payload_bytes": size,
            "gb_per_s": {name: results.median(size, name) for name in found},
            "rounds_gb_per_s": found,
            "framing_us": {
                name: percentile(us, 50) for name, us in results.framing_us.get(size, {}).items()
            },
            "send_share_of": {of: results.share(size, "send", of) for of in _REFERENCES},
        }
        for size, found in results.rates.items()
    ]
    details = {
        "transport": results.transport,
        "rounds": results.rounds,
        "stolen": results.stolen,
        "failures": results.failures,
        "latency_us": results.latency_us,
        "plain_latency_us": results.plain_latency_us,
        "handovers": [found for done in results.prompts.values() for found in done],
        "stack": results.stack,
    }
    arguments = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(values).items()
    }
    return write_report("transfer", arguments, rows, describe_machine(), out, details=details)


def _say(line: str) -> None:
    print(line, flush=True)
