"""Numbers of a round, their medians over rounds, and who wins."""

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvrelay_bench.interference.experiment import Plan, Round
from kvrelay_bench.report import percentile
from kvrelay_bench.serve.client import Answer, Outcome
from kvrelay_bench.serve.metrics import tokens_in_company, ttft

CLOSE = 0.03
"""Medians nearer than this are called equal."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the table."""

    key: str
    label: str
    lower_is_better: bool = True
    decides: bool = True
    """Whether it says who wins; a ratio of two rows above it does not."""


METRICS = (
    Metric("quiet_itl_p50_ms", "ITL p50, streams alone (ms)"),
    Metric("quiet_itl_p99_ms", "ITL p99, streams alone (ms)"),
    Metric("busy_itl_p50_ms", "ITL p50, prompts arriving (ms)"),
    Metric("busy_itl_p99_ms", "ITL p99, prompts arriving (ms)"),
    Metric("busy_itl_max_ms", "ITL max, prompts arriving (ms)"),
    Metric("p99_over_p50", "ITL p99 / p50, prompts arriving", decides=False),
    Metric("p99_over_quiet_p50", "ITL p99 arriving / p50 alone", decides=False),
    Metric("long_ttft_p50_ms", "TTFT p50 of long prompts (ms)"),
    Metric("long_ttft_max_ms", "TTFT max of long prompts (ms)"),
    Metric("quiet_stream_tokens_per_s", "stream tokens/s, alone", lower_is_better=False),
    Metric("busy_stream_tokens_per_s", "stream tokens/s, prompts arriving", lower_is_better=False),
    Metric("busy_total_tokens_per_s", "prompt + output tokens/s, arriving", lower_is_better=False),
)


def gaps_between(answer: Answer, start: float, end: float) -> list[tuple[float, float]]:
    """(when it ended, seconds) of every gap that ended in the window, however early it began."""
    return [
        (later, later - earlier)
        for earlier, later in itertools.pairwise(answer.chunks)
        if start < later <= end
    ]


def tokens_between(answer: Answer, start: float, end: float) -> int:
    """Tokens read in the window."""

    def until(time: float) -> int:
        place = bisect_right(answer.chunks, time)
        return answer.counts[place - 1] if place else 0

    return until(end) - until(start)


def round_numbers(result: Round, plan: Plan) -> dict[str, float | None]:
    """By the keys of `METRICS`; None where nothing was measured, such as a TTFT of failures only."""
    start, end = result.busy_from, result.busy_until
    quiet = _itl(result, result.quiet_from, start)
    busy = _itl(result, start, end)
    answered = [s.answer for s in result.long if s.answer.outcome is Outcome.OK]
    waits = [time * 1e3 for answer in answered if (time := ttft(answer)) is not None]
    tokens = sum(tokens_between(answer, start, end) for answer in result.streams)
    alone = sum(tokens_between(answer, result.quiet_from, start) for answer in result.streams)
    moved = tokens + sum(plan.long_input + answer.tokens for answer in answered)
    quiet_p50, busy_p50 = _percentile(quiet, 50), _percentile(busy, 50)
    busy_p99 = _percentile(busy, 99)
    return {
        "quiet_itl_p50_ms": quiet_p50,
        "quiet_itl_p99_ms": _percentile(quiet, 99),
        "busy_itl_p50_ms": busy_p50,
        "busy_itl_p99_ms": busy_p99,
        "busy_itl_max_ms": max(busy, default=None),
        "p99_over_p50": _ratio(busy_p99, busy_p50),
        "p99_over_quiet_p50": _ratio(busy_p99, quiet_p50),
        "long_ttft_p50_ms": _percentile(waits, 50),
        "long_ttft_max_ms": max(waits, default=None),
        "quiet_stream_tokens_per_s": alone / (start - result.quiet_from),
        "busy_stream_tokens_per_s": tokens / (end - start),
        "busy_total_tokens_per_s": moved / (end - start),
        "busy_s": end - start,
        "tokens_together_share": _together(result.streams),
    }


def _itl(result: Round, start: float, end: float) -> list[float]:
    return [gap * 1e3 for answer in result.streams for _, gap in gaps_between(answer, start, end)]


def _percentile(values: Sequence[float], q: float) -> float | None:
    return percentile(values, q) if values else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _together(streams: Sequence[Answer]) -> float | None:
    tokens = sum(answer.tokens for answer in streams)
    return sum(map(tokens_in_company, streams)) / tokens if tokens else None


@dataclass(frozen=True, slots=True)
class Spread:
    """A metric over the rounds of one contender."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return show(self.median)
        return f"{show(self.median)} ({show(self.low)}-{show(self.high)})"


def show(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(rounds: Sequence[Mapping[str, float | None]], key: str) -> Spread | None:
    values = [value for numbers in rounds if (value := numbers.get(key)) is not None]
    return Spread(percentile(values, 50), min(values), max(values)) if values else None


def winner(metric: Metric, spreads: Mapping[str, Spread | None]) -> str | None:
    """The contender with the best median, unless the next best one's rounds overlap with its own or
    come within `CLOSE`; None then, and where fewer than two have been measured.
    """
    measured = [(name, found) for name, found in spreads.items() if found is not None]
    measured.sort(key=lambda item: item[1].median, reverse=not metric.lower_is_better)
    if len(measured) < 2:
        return None
    (name, best), (_, next_best) = measured[:2]
    overlap = best.low <= next_best.high and next_best.low <= best.high
    near = abs(best.median - next_best.median) <= CLOSE * abs(next_best.median)
    return None if overlap or near else name
