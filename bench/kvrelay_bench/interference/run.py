"""`kvrelay bench interference` from values to report."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvrelay_bench.interference.experiment import Plan, Round, check_context, run_round, warm_up
from kvrelay_bench.interference.numbers import (
    METRICS,
    gaps_between,
    round_numbers,
    show,
    spread,
    winner,
)
from kvrelay_bench.machine import describe_machine
from kvrelay_bench.report import Table, write_report
from kvrelay_bench.serve.stack import Target, own_stack, stop_on_signal
from kvrelay_infra.host import read_cores


@dataclass(slots=True)
class Contender:
    """One way to use the cores, and its rounds so far."""

    name: str
    prefill: int
    threads: int
    """Of each worker."""
    chunk: int
    """`--max-batch-tokens` of its workers."""
    target: Target | None = None
    rounds: list[Round] = field(default_factory=list)
    numbers: list[dict[str, float | None]] = field(default_factory=list)


def contenders(cores: int, chunks: Sequence[int]) -> list[Contender]:
    """One disaggregated pair and an aggregated worker per chunk size, with equal threads in all."""
    half = max(1, cores // 2)
    split = Contender("disaggregated", 1, half, chunks[0])
    # Named by what sets them apart; chunks given twice are one contender.
    whole = [Contender(f"aggregated {c}", 0, 2 * half, c) for c in dict.fromkeys(chunks)]
    return [split, *whole]


def plan_of(values: SimpleNamespace) -> Plan:
    return Plan(
        streams=values.streams,
        stream_input=values.stream_input,
        quiet_s=values.quiet,
        arrivals=values.arrivals,
        every_s=values.every,
        long_input=values.long_input,
        long_output=values.long_output,
        seed=values.seed,
        timeout_s=values.timeout,
    )


def run_interference(values: SimpleNamespace) -> int:
    """Start every contender, measure in turns, print who wins where; returns the exit code.

    Raises:
        UsageError: lengths the model can't hold, or matplotlib is missing.
        StartupError: a stack can't start.
        ServiceError: a server did not answer.
    """
    from kvrelay.cli.reply import exit_on_sigterm

    if values.plot is not None:
        from kvrelay_bench.plot import require_matplotlib

        require_matplotlib()
    exit_on_sigterm()
    cores = values.cores or read_cores()
    if cores < 2:
        _say("note: one core for two workers: they take turns on it")
    plan, parties = plan_of(values), contenders(cores, values.chunk)
    with ExitStack() as stacks:
        for party in parties:
            workers = "1 prefill + 1 decode" if party.prefill else "1 decode"
            _say(f"\n{party.name}: {workers}, {party.threads} threads each, chunk {party.chunk}")
            party.target = stacks.enter_context(
                own_stack(
                    values,
                    prefill=party.prefill,
                    decode=1,
                    threads=party.threads,
                    max_batch_tokens=party.chunk,
                )
            )
            check_context(plan, party.target)
        interrupted = asyncio.run(measure(values, plan, parties))
    done = [party for party in parties if party.rounds]
    if done:
        _say(f"\n{result_table(done).text()}")
        if len(done) > 1:
            _say(f"\n{verdict(done)}")
        if values.plot is not None:
            from kvrelay_bench.interference.charts import draw

            title = f"{values.model}: {plan.streams} streams, prompts of {plan.long_input} tokens"
            draw(values.plot, {party.name: party.rounds for party in done}, title=title)
            _say(f"plot: {values.plot}")
    return 130 if interrupted else 0


async def measure(values: SimpleNamespace, plan: Plan, parties: Sequence[Contender]) -> bool:
    """All rounds, contenders taking turns; True when it was interrupted. Writes after every round."""
    out = Path(values.out) if values.out else None
    if out is not None:
        _say(f"rounds go to {out}")
    with stop_on_signal() as stop:
        stopping = asyncio.ensure_future(stop.wait())
        working = asyncio.ensure_future(_all_rounds(values, plan, parties, out))
        await asyncio.wait({stopping, working}, return_when=asyncio.FIRST_COMPLETED)
        interrupted = not working.done()
        for task in (stopping, working):
            task.cancel()
        await asyncio.wait({stopping, working})
        if not working.cancelled():
            working.result()
    return interrupted


async def _all_rounds(
    values: SimpleNamespace, plan: Plan, parties: Sequence[Contender], out: Path | None
) -> None:
    for party in parties:
        began = time.monotonic()
        await warm_up(_target(party), plan)
        _say(f"{party.name}: warm after {time.monotonic() - began:.1f} s")
    for number in range(values.rounds):
        # Back and forth, so that a machine that gets slower or faster favours nobody.
        for party in parties if number % 2 == 0 else reversed(parties):
            result = await run_round(_target(party), plan, number)
            party.rounds.append(result)
            party.numbers.append(round_numbers(result, plan))
            _say(f"round {number + 1} of {values.rounds}, {party.name}: {_line(party.numbers[-1])}")
            for problem in result.problems:
                _say(f"  note: {problem}")
            written = write(values, parties, out)
            if out != written:
                _say(f"rounds so far are in {written}")
            out = written


def _target(party: Contender) -> Target:
    if party.target is None:
        raise ValueError(f"{party.name} is not started")
    return party.target


def _line(numbers: dict[str, float | None]) -> str:
    def rounded(key: str) -> str:
        value = numbers[key]
        return "none" if value is None else f"{value:.0f}"

    return (
        f"ITL p50/p99 alone {rounded('quiet_itl_p50_ms')}/{rounded('quiet_itl_p99_ms')}, arriving "
        f"{rounded('busy_itl_p50_ms')}/{rounded('busy_itl_p99_ms')} ms; TTFT {rounded('long_ttft_p50_ms')} ms; "
        f"{rounded('busy_total_tokens_per_s')} tokens/s"
    )


def result_table(parties: Sequence[Contender]) -> Table:
    """A row for each metric: the median over rounds (lowest-highest)."""
    rows: list[list[object]] = []
    for metric in METRICS:
        spreads = [spread(party.numbers, metric.key) for party in parties]
        rows.append([metric.label, *(None if found is None else str(found) for found in spreads)])
    return Table(("median (range)", *(party.name for party in parties)), rows)


def verdict(parties: Sequence[Contender]) -> str:
    """Where the first contender wins and where it loses, against each of the others."""
    first, *others = parties
    blocks: list[str] = []
    for other in others:
        groups: dict[str, list[str]] = {"better": [], "worse": [], "about equal": []}
        for metric in METRICS:
            mine, theirs = spread(first.numbers, metric.key), spread(other.numbers, metric.key)
            if not metric.decides or mine is None or theirs is None:
                continue
            best = winner(metric, {first.name: mine, other.name: theirs})
            group = {first.name: "better", other.name: "worse", None: "about equal"}[best]
            groups[group].append(f"    {metric.label}: {show(mine.median)}, {show(theirs.median)}")
        lines = [
            "\n".join([f"  {group}", *found]) if found else f"  {group}: nothing"
            for group, found in groups.items()
        ]
        blocks.append("\n".join([f"{first.name} against {other.name}", *lines]))
    return "\n\n".join(blocks)


def write(values: SimpleNamespace, parties: Sequence[Contender], out: Path | None) -> Path:
    """The rounds so far, with every ITL of the streams."""
    rows: list[dict[str, Any]] = [
        {
            "contender": party.name,
            "prefill_workers": party.prefill,
            "threads_per_worker": party.threads,
            "chunk": party.chunk,
            "round": number,
            **numbers,
            "problems": party.rounds[number].problems,
        }
        for party in parties
        for number, numbers in enumerate(party.numbers)
    ]
    arguments = {n: v if _is_plain(v) else str(v) for n, v in vars(values).items()}
    details = {
        "itl": "streams: [seconds after the first long prompt, ITL in ms]; long: [sent, first token]",
        "series": [
            {"contender": party.name, "round": number, **_series(result)}
            for party in parties
            for number, result in enumerate(party.rounds)
        ],
    }
    return write_report("interference", arguments, rows, describe_machine(), out, details=details)


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool | None | tuple)


def _series(result: Round) -> dict[str, Any]:
    def after(time: float) -> float:
        return round(time - result.busy_from, 4)

    return {
        "quiet_from_s": after(result.quiet_from),
        "busy_until_s": after(result.busy_until),
        "streams": [
            [
                [after(when), round(gap * 1e3, 2)]
                for when, gap in gaps_between(answer, result.quiet_from, result.busy_until)
            ]
            for answer in result.streams
        ],
        "long": [
            [after(s.answer.sent), after(s.answer.chunks[0]) if s.answer.chunks else None]
            for s in result.long
        ],
    }


def _say(line: str) -> None:
    print(line, flush=True)
