"""What happened: faults as they fired, requests as they ended, and the numbers made of both. Pure."""

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvrelay_bench.report import percentile
from kvrelay_chaos.load import Outcome
from kvrelay_chaos.plan import Fault
from kvrelay_chaos.soak import Growth
from kvrelay_chaos.verdict import GOOD, Verdict

KEPT = 20
"""Outcomes that are not good, and gaps, that are kept one by one."""
JUST_BEFORE_S = 0.5
"""A fault so long before a stream's last piece may still be what stopped it."""


@dataclass(frozen=True, slots=True)
class Fired:
    """A fault that hit something."""

    fault: Fault
    at: float
    """By the loop's clock."""
    breaks: bool


@dataclass(frozen=True, slots=True)
class Spread:
    """Order statistics in seconds; None of nothing."""

    count: int
    p50: float | None
    p99: float | None
    maximum: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        found = sorted(values)
        if not found:
            return cls(0, None, None, None)
        return cls(len(found), percentile(found, 50), percentile(found, 99), found[-1])


@dataclass(frozen=True, slots=True)
class Leak:
    """Something that was still held when nothing ran any more."""

    where: str
    what: str
    count: int

    def __str__(self) -> str:
        return f"{self.where}: {self.count} {self.what}"


@dataclass(slots=True)
class Ledger:
    """Filled while a run goes on."""

    planned: Mapping[str, int]
    fired: list[Fired] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)
    """Faults that found nothing to hit, by kind."""
    nudges: int = 0
    """Workers held up for a moment, so that another one got the message that a fault waited for."""
    outcomes: list[Outcome] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    quiet_points: int = 0
    settled: list[float] = field(default_factory=list)
    """Seconds from the last request's end until every block was back, at each quiet point."""
    crashes: list[str] = field(default_factory=list)
    """Processes that ended by themselves."""
    restarts: dict[str, int] = field(default_factory=dict)
    last_lines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What each process printed last, of a run that did not pass."""
    growth: Sequence[Growth] = ()
    """Of what the processes take of the machine."""

    def count(self, verdict: Verdict) -> int:
        return sum(outcome.verdict is verdict for outcome in self.outcomes)

    @property
    def fired_by_kind(self) -> Counter[str]:
        return Counter(fired.fault.kind for fired in self.fired)

    @property
    def bad(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.verdict not in GOOD]

    @property
    def unfired(self) -> int:
        return sum(self.planned.values()) - len(self.fired)

    @property
    def passed(self) -> bool:
        """Nothing wrong, hung or leaked, nothing ended by itself, and every fault fired."""
        return not (self.bad or self.leaks or self.crashes or self.unfired)

    def codes(self) -> Counter[str]:
        """Errors by their codes."""
        return Counter(outcome.code for outcome in self.outcomes if outcome.code is not None)

    def time_to_error(self) -> Spread:
        """How long clients were left without a sign before an error came.

        Counted from the first breaking fault after the last piece of the stream, or from that piece where
        there was none between: so it is never less than what the fault cost.
        """
        return Spread.of(seconds for seconds, _ in self._errors())

    def _errors(self) -> Iterator[tuple[float, Outcome]]:
        breaks = sorted(fired.at for fired in self.fired if fired.breaks)
        for outcome in self.outcomes:
            if outcome.verdict is Verdict.TYPED_ERROR and outcome.streamed:
                begin = _first_after(breaks, outcome.last_sign, outcome.ended)
                yield outcome.ended - begin, outcome

    def slowest_errors(self) -> list[dict[str, Any]]:
        """The errors that took longest, with what fired while the client waited."""
        slowest = sorted(self._errors(), key=lambda found: found[0], reverse=True)
        return [
            {
                **_described(outcome),
                "silent_s": round(seconds, 3),
                "faults": self._breaks_between(outcome.last_sign, outcome.ended),
            }
            for seconds, outcome in slowest[:KEPT]
        ]

    def recovery_gap(self) -> Spread:
        """Pauses in streams that another worker carried on."""
        return Spread.of(gap.seconds for outcome in self.outcomes for gap in outcome.gaps)

    def longest_gaps(self) -> list[dict[str, Any]]:
        """The longest pauses, and the breaking faults that fired in each."""
        gaps = sorted(
            (gap for outcome in self.outcomes for gap in outcome.gaps),
            key=lambda gap: gap.seconds,
            reverse=True,
        )
        return [
            {
                "seconds": round(gap.seconds, 3),
                "faults": self._breaks_between(gap.began, gap.began + gap.seconds),
            }
            for gap in gaps[:KEPT]
        ]

    def _breaks_between(self, began: float, ended: float) -> list[str]:
        return [
            f"{fired.fault.kind} {fired.fault.target} {fired.at - began:+.2f} s"
            for fired in self.fired
            if fired.breaks and began - JUST_BEFORE_S < fired.at < ended
        ]

    def numbers(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "faults_planned": sum(self.planned.values()),
            "faults_fired": len(self.fired),
            "nudges": self.nudges,
            "requests": len(self.outcomes),
            **{verdict.name.lower(): self.count(verdict) for verdict in Verdict},
            "errors_by_code": dict(self.codes()),
            "blocks_leaked": sum(leak.count for leak in self.leaks if leak.what == "blocks"),
            "leaks": [str(leak) for leak in self.leaks],
            "quiet_points": self.quiet_points,
            "blocks_back_after_s": Spread.of(self.settled),
            "time_to_error_s": self.time_to_error(),
            "recovery_gap_s": self.recovery_gap(),
            "longest_gaps": self.longest_gaps(),
            "slowest_errors": self.slowest_errors(),
            "restarts": dict(self.restarts),
            "crashes": list(self.crashes),
            "last_lines": {} if self.passed else self.last_lines,
            "growth": list(self.growth),
            "not_good": [_described(outcome) for outcome in self.bad[:KEPT]],
        }

    def rows(self) -> list[dict[str, Any]]:
        """Faults by kind."""
        fired = self.fired_by_kind
        return [
            {"fault": kind, "planned": planned, "fired": fired[kind]}
            for kind, planned in sorted(self.planned.items())
        ]


def _first_after(times: Sequence[float], begin: float, end: float) -> float:
    place = bisect.bisect_right(times, begin)
    return times[place] if place < len(times) and times[place] < end else begin


def _described(outcome: Outcome) -> dict[str, Any]:
    return {
        "question": outcome.question,
        "router": outcome.router,
        "verdict": str(outcome.verdict),
        "code": outcome.code,
        "detail": outcome.detail,
        "began": round(outcome.began, 3),
        "seconds": round(outcome.ended - outcome.began, 3),
    }
