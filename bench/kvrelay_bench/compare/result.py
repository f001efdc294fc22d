"""From single calls to rows, tables and the sentences under them."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvrelay_bench.compare.points import Point
from kvrelay_bench.compare.processes import EngineSpec, Run
from kvrelay_bench.compare.work import WEIGHT_BYTES, work_of
from kvrelay_bench.machine import Limits
from kvrelay_bench.models import ModelShape
from kvrelay_bench.report import Summary, Table, summarise

_CLASSES = {
    "bfloat16": "bf16",
    "float16": "bf16",
    "float32": "fp32",
    "int8": "int8",
    "q8_0": "int8",
}
"""Engines are compared within one class of weights."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One timed call."""

    point: Point
    engine: str
    round: int
    seconds: float
    cpu_seconds: float
    foreign_share: float

    @classmethod
    def of(cls, point: Point, engine: str, number: int, run: Run) -> "Measurement":
        return cls(point, engine, number, run.seconds, run.cpu_seconds, run.foreign_share)


@dataclass(frozen=True, slots=True)
class Row:
    """One engine at one point."""

    point: Point
    engine: str
    dtype_class: str
    seconds: Summary
    output_per_s: float
    """Generated tokens per second of the median call, prompt time included."""
    total_per_s: float
    """Prompt and generated tokens per second."""
    read_share: float | None
    """Least bytes read, per second, of the measured streaming read."""
    gemm_share: float | None
    """Operations per second, of the measured floating-point matrix product."""
    floor_share: float | None
    """The time it can't be done faster than, of the median."""
    foreign_share: float
    """Share of the machine's cores that other processes had during the calls: what disturbed them."""

    @property
    def rate(self) -> float:
        """What the point is judged by."""
        return self.total_per_s if self.point.is_prefill else self.output_per_s

    def to_json(self) -> dict[str, Any]:
        return {
            "point": str(self.point),
            "engine": self.engine,
            "dtype_class": self.dtype_class,
            "metric": "total tokens/s" if self.point.is_prefill else "output tokens/s",
            "rate": self.rate,
            "output_tokens_per_s": self.output_per_s,
            "total_tokens_per_s": self.total_per_s,
            "seconds": self.seconds,
            "spread": self.seconds.spread,
            "read_share": self.read_share,
            "gemm_share": self.gemm_share,
            "floor_share": self.floor_share,
            "foreign_cpu_share": self.foreign_share,
        }


def make_rows(
    measured: Sequence[Measurement],
    specs: Mapping[str, EngineSpec],
    shape: ModelShape,
    limits: Limits | None,
) -> list[Row]:
    """A row for every engine and point that was measured, in the order of measurement."""
    groups: dict[tuple[Point, str], list[Measurement]] = {}
    for measurement in measured:
        groups.setdefault((measurement.point, measurement.engine), []).append(measurement)
    return [
        make_row(point, specs[engine], group, shape, limits)
        for (point, engine), group in groups.items()
    ]


def make_row(
    point: Point,
    spec: EngineSpec,
    group: Sequence[Measurement],
    shape: ModelShape,
    limits: Limits | None,
) -> Row:
    """Summarise the calls of one engine at one point."""
    seconds = summarise(measurement.seconds for measurement in group)
    work = work_of(point, shape, WEIGHT_BYTES[spec.dtype])
    return Row(
        point=point,
        engine=spec.name,
        dtype_class=_CLASSES[spec.dtype],
        seconds=seconds,
        output_per_s=point.generated / seconds.median,
        total_per_s=point.tokens / seconds.median,
        read_share=None
        if limits is None
        else work.bytes / seconds.median / limits.read_bytes_per_s,
        gemm_share=None if limits is None else work.flops / seconds.median / limits.product_flops,
        floor_share=None if limits is None else work.floor_s(limits) / seconds.median,
        foreign_share=statistics.fmean(call.foreign_share for call in group),
    )


def compare_table(rows: Sequence[Row], ours: Iterable[str]) -> Table:
    """Every row, with its rate relative to the best peer of its class at that point."""
    own = set(ours)
    return Table(
        ("point", "engine", "weights", "tokens/s", "spread", "n", "read", "GEMM", "of floor",
         "vs best peer"),
        [
            (
                f"{row.point}{' total' if row.point.is_prefill else ''}",
                row.engine,
                row.dtype_class,
                row.rate,
                f"{row.seconds.spread:.0%}",
                row.seconds.count,
                _percent(row.read_share),
                _percent(row.gemm_share),
                _percent(row.floor_share),
                _ratio(row, _best(rows, row.point, {row.dtype_class}, without=own)),
            )
            for row in sorted(rows, key=lambda row: [r.point for r in rows].index(row.point))
        ],
    )  # fmt: skip


def verdicts(rows: Sequence[Row], ours: str, ours_int8: str) -> list[str]:
    """One sentence a point on how this engine stands."""
    own = {ours, ours_int8}
    by_key = {(row.point, row.engine): row for row in rows}
    lines = []
    for point in dict.fromkeys(row.point for row in rows):
        mine, mine_int8 = by_key.get((point, ours)), by_key.get((point, ours_int8))
        if mine:
            best = _best(rows, point, {mine.dtype_class}, without=own)
            any_float = _best(rows, point, {"bf16", "fp32"}, without=own)
            parts = [_versus(mine, best)]
            if any_float and any_float != best:
                parts.append(f"{_versus(mine, any_float)} in {any_float.dtype_class}")
            lines.append(f"{point}: {ours} {', '.join(filter(None, parts)) or 'has no peer'}")
        if mine_int8:
            q8 = _best(rows, point, {"int8"}, without=own)
            parts = [_versus(mine_int8, mine), _versus(mine_int8, q8)]
            lines.append(f"{point}: {ours_int8} {', '.join(filter(None, parts)) or 'has no peer'}")
    return lines


def best_peer(rows: Sequence[Row], row: Row, ours: Iterable[str]) -> Row | None:
    """The fastest peer of the same class at the same point."""
    return _best(rows, row.point, {row.dtype_class}, without=set(ours))


def _best(
    rows: Sequence[Row], point: Point, dtype_classes: set[str], *, without: set[str]
) -> Row | None:
    found = [
        row
        for row in rows
        if row.point == point and row.engine not in without and row.dtype_class in dtype_classes
    ]
    return max(found, key=lambda row: row.rate, default=None)


def _versus(row: Row, other: Row | None) -> str:
    return f"{row.rate / other.rate:.2f}x {other.engine}" if other else ""


def _ratio(row: Row, best: Row | None) -> str:
    return f"{row.rate / best.rate:.2f}x" if best else "–"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
