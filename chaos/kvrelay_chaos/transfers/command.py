"""`kvrelay chaos --scenario transfers`: single transfers, killed and damaged by the thousand."""

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvrelay_bench.machine import describe_machine
from kvrelay_bench.report import Table, percentile, write_report
from kvrelay_chaos.transfers.answers import AnswerReport, compare_answers
from kvrelay_chaos.transfers.flips import FlipReport, flip_bits
from kvrelay_chaos.transfers.kills import KillReport, kill_sides

_SAY_EVERY_S = 10.0


def run_transfers(values: SimpleNamespace) -> int:
    """Run the parts that were asked for, print and write them; returns the exit code.

    A result file that is there already keeps the parts that this run does not have.

    Raises:
        EngineFailed: a process that had to live fell silent.
    """
    parts: dict[str, KillReport | FlipReport | AnswerReport] = {}
    if values.kills:
        parts["kills"] = run_kills(values.kills, values.seed)
    if values.flips:
        parts["flips"] = run_flips(values.flips, values.seed)
    if values.answers:
        parts["answers"] = run_answers(values.answers, values.seed)
    for name, part in parts.items():
        rows = [(what, _shown(found)) for what, found in _rows(part).items()]
        print(f"\n{Table((name, ''), rows).text()}")
    path = _write(values, parts)
    print(f"\nresult: {path}")
    return 0 if all(part.held for part in parts.values()) else 1


def run_kills(count: int, seed: int) -> KillReport:
    """`kill -9` of either side by turns at random bytes of `count` transfers over UCX."""
    return kill_sides(count, seed, on_progress=_progress(count))


def run_flips(count: int, seed: int) -> FlipReport:
    """`count` transfers with one flipped bit each."""
    return asyncio.run(flip_bits(count, seed))


def run_answers(count: int, seed: int, model_dir: Path | None = None) -> AnswerReport:
    """`count` answers over transfers with one flipped bit each; without a model, over a small random one."""
    from kvrelay_bench.models import bench_model

    return asyncio.run(compare_answers(count, seed, model_dir or bench_model("tiny")))


def _progress(count: int) -> Any:
    said = time.monotonic()

    def say(report: KillReport) -> None:
        nonlocal said
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            print(f"{report.kills} of {count} killed, {report.exact_afterwards} went on exactly")

    return say


def _rows(part: KillReport | FlipReport | AnswerReport) -> dict[str, Any]:
    """The numbers of a part, as they are printed and written."""
    rows: dict[str, Any] = {"held": part.held}
    match part:
        case KillReport():
            rows |= {
                "kills": part.kills,
                "killed": dict(part.killed),
                "survivor deaths": part.survivor_deaths,
                "leaks": len(part.leaks),
                "untyped errors": len(part.untyped),
                "next transfer exact": part.exact_afterwards,
                "outcomes": dict(part.outcomes),
                "bytes of a transfer": part.transfer_bytes,
                "deaths by tenth of the transfer": part.histogram(),
                "noticed by themselves": len(part.alone_s),
                "blocks back, s from the kill": _spread(part.alone_s),
                "told": len(part.told_s),
                "blocks back, s from the word": _spread(part.told_s),
                "survivors before and after": part.growth,
            }
        case FlipReport():
            rows |= {
                "flips": part.flips,
                "detected": part.detected,
                "exact afterwards": part.exact,
                "where": dict(part.where),
                "failures": part.failures[:10],
                "leaks": len(part.leaks),
            }
        case AnswerReport():
            rows |= {
                "requests": part.requests,
                "flips": part.flips,
                "detected": part.detected,
                "exact answers": part.exact,
                "failures": part.failures[:10],
            }
    return rows | {"seconds": round(part.seconds, 1)}


def _spread(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    found = {"p50": percentile(seconds, 50), "p99": percentile(seconds, 99), "max": max(seconds)}
    return {name: round(value, 4) for name, value in found.items()}


def _shown(found: object) -> str:
    match found:
        case dict():
            return ", ".join(f"{name} {_shown(value)}" for name, value in found.items()) or "none"
        case list() | tuple():
            return " ".join(map(str, found)) or "none"
        case _:
            return str(found)


def _write(
    values: SimpleNamespace, parts: Mapping[str, KillReport | FlipReport | AnswerReport]
) -> Path:
    out = Path(values.out) if values.out else None
    kept: dict[str, Any] = {}
    if out is not None and out.exists():
        kept = {row["part"]: row for row in json.loads(out.read_text())["rows"]}
    rows = kept | {
        name: {"part": name, "seed": values.seed, **_rows(p)} for name, p in parts.items()
    }
    machine = describe_machine()
    arguments = {"kills": values.kills, "flips": values.flips, "answers": values.answers,
                 "seed": values.seed}  # fmt: skip
    return write_report(
        "chaos-transfers",
        arguments,
        list(rows.values()),
        machine,
        out,
        command="kvrelay chaos --scenario transfers",
    )
