"""The table that a run ends in, and the file it leaves."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvrelay_bench.machine import describe_machine
from kvrelay_bench.report import Table, write_report
from kvrelay_chaos.ledger import Ledger, Spread
from kvrelay_chaos.plan import Plan
from kvrelay_chaos.soak import QUANTITIES
from kvrelay_chaos.verdict import Verdict


def print_result(ledger: Ledger, plan: Plan, seconds: float) -> None:
    """Faults by kind, then what became of the requests."""
    rows = [(row["fault"], row["planned"], row["fired"]) for row in ledger.rows()]
    total = ("all", len(plan.faults), len(ledger.fired))
    print(f"\n{Table(('fault', 'planned', 'fired'), [*rows, total]).text()}\n")
    print(result_table(ledger).text())
    if ledger.growth:
        print(f"\n{growth_table(ledger).text()}")
    if ledger.codes():
        found = ", ".join(f"{code} {count}" for code, count in ledger.codes().most_common())
        print(f"errors: {found}")
    print(f"seed {plan.seed}, {seconds:.0f} s in all")
    for line in problems(ledger):
        print(line)


def result_table(ledger: Ledger) -> Table:
    """The numbers of a run."""
    numbers = ledger.numbers()
    rows: list[tuple[str, object]] = [("requests", numbers["requests"])]
    rows += [(str(verdict), ledger.count(verdict)) for verdict in Verdict]
    rows += [
        ("blocks leaked", numbers["blocks_leaked"]),
        ("other leaks", len(ledger.leaks) - sum(x.what == "blocks" for x in ledger.leaks)),
        ("ended by themselves", len(ledger.crashes)),
        ("restarts", sum(ledger.restarts.values())),
        ("time to error p50 / p99 / max, s", _spread(ledger.time_to_error())),
        ("recovery gap p50 / p99 / max, s", _spread(ledger.recovery_gap())),
        ("blocks back p50 / p99 / max, s", _spread(numbers["blocks_back_after_s"])),
    ]
    return Table(("result", "count"), rows)


def growth_table(ledger: Ledger) -> Table:
    """Memory, descriptors, threads and shared memory: how much more of them an hour."""
    header = ("process", "seconds", "MiB", "MiB/h", "fds", "fds/h", "threads", "threads/h",
              "segments", "segments/h")  # fmt: skip
    rows: list[list[object]] = []
    for growth in ledger.growth:
        row: list[object] = [growth.process, round(growth.seconds)]
        for quantity in QUANTITIES:
            unit = 2**20 if quantity == "resident_bytes" else 1
            row += [growth.last[quantity] // unit, growth.per_hour[quantity] / unit]
        rows.append(row)
    return Table(header, rows)


def problems(ledger: Ledger) -> list[str]:
    """A line for everything that must not be."""
    lines = [f"leaked: {leak}" for leak in ledger.leaks]
    lines += [f"ended: {crash}" for crash in ledger.crashes]
    lines += [f"{outcome.verdict}: question {outcome.question} on {outcome.router}, "
              f"{outcome.code or 'no error'}: {outcome.detail}" for outcome in ledger.bad[:5]]  # fmt: skip
    if ledger.unfired:
        lines.append(f"not fired: {ledger.unfired} faults")
    return lines


def write_result(values: SimpleNamespace, ledger: Ledger, plan: Plan, seconds: float) -> Path:
    """The result as JSON; returns where."""
    arguments: Mapping[str, Any] = {
        name: value if isinstance(value, str | int | float | bool | None) else str(value)
        for name, value in vars(values).items()
        if name != "api_key"
    }
    return write_report(
        "chaos",
        arguments,
        ledger.rows(),
        describe_machine(),
        Path(values.out) if values.out else None,
        command="kvrelay chaos",
        details={**ledger.numbers(), "seed": plan.seed, "seconds": round(seconds, 1)},
    )


def _spread(spread: Spread) -> str:
    if spread.count == 0:
        return "–"
    numbers = (spread.p50, spread.p99, spread.maximum)
    return " / ".join(f"{number:.2f}" for number in numbers if number is not None)
