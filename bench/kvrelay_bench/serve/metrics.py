"""From what the client saw to the numbers people compare.

- TTFT: sending to the first piece of text.
- ITL: gap between two pieces of text of one answer, pooled over all answers. Several tokens may come at
  once (a slow reader, a byte of a character held back, speculative decoding), and a model that has
  written its end goes on in tokens without text; ITL then means little, so the share of tokens that
  came alone is reported with it.
- TPOT: (E2E - TTFT) / (n - 1) of one answer of n tokens; none for a single token.
- E2E: sending to the end of the stream.
- Goodput: requests a second that met every objective. Rejected, aborted and failed requests are part of
  what was sent and met none.

Latencies are of the requests that ended well.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvrelay.cli.units import parse_duration
from kvrelay_bench.report import percentile
from kvrelay_bench.serve.client import Answer, Outcome
from kvrelay_bench.serve.load import LoadRun, Sample

QUANTILES = (50, 95, 99)
LATENCIES = ("ttft", "itl", "tpot", "e2e")
_OBJECTIVES = ("ttft", "tpot", "e2e")
BUSY_CLIENT = 0.8
"""From this share of a core on, the client may be what is measured."""
LATE_CLIENT_S = 0.02


def ttft(answer: Answer) -> float | None:
    return answer.chunks[0] - answer.sent if answer.chunks else None


def e2e(answer: Answer) -> float:
    return answer.ended - answer.sent


def tpot(answer: Answer) -> float | None:
    first = ttft(answer)
    if first is None or answer.tokens < 2:
        return None
    return (e2e(answer) - first) / (answer.tokens - 1)


def gaps(answer: Answer) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(answer.chunks)]


@dataclass(frozen=True, slots=True)
class Objectives:
    """Service level objectives: the longest each latency may be, in seconds."""

    limits: tuple[tuple[str, float], ...]

    def met(self, answer: Answer) -> bool:
        """Whether a request counts for goodput. One token has no TPOT to be too long."""
        if answer.outcome is not Outcome.OK:
            return False
        measured = {"ttft": ttft(answer), "tpot": tpot(answer), "e2e": e2e(answer)}
        if measured["ttft"] is None:
            return False  # no text at all: the user saw nothing
        return all((measured[name] or 0.0) <= limit for name, limit in self.limits)

    def __str__(self) -> str:
        return ", ".join(f"{name.upper()} <= {limit * 1e3:g} ms" for name, limit in self.limits)


def parse_objectives(text: str) -> Objectives:
    """`ttft=500ms,tpot=50ms`; also `e2e`."""
    limits: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        if name not in _OBJECTIVES:
            raise ValueError(f"must be like ttft=500ms,tpot=50ms; {name!r} is not one of "
                             f"{', '.join(_OBJECTIVES)}")  # fmt: skip
        limits[name] = parse_duration(value)
    return Objectives(tuple(limits.items()))


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of one latency, in seconds."""

    p50: float
    p95: float
    p99: float
    maximum: float
    count: int


def quantiles(values: Iterable[float]) -> Quantiles | None:
    """None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p95, p99 = (percentile(ordered, q) for q in QUANTILES)
    return Quantiles(p50, p95, p99, ordered[-1], len(ordered))


@dataclass(frozen=True, slots=True)
class Point:
    """One load and what came of it. Rates are per second of the whole run."""

    load: str
    sent: int
    outcomes: dict[str, int]
    seconds: float
    """From the start to the end of the last answer, or to the interruption."""
    request_rate: float
    """Requests that ended well."""
    output_tokens_per_s: float
    """Of requests that ended well."""
    total_tokens_per_s: float
    """The same with their prompts."""
    short_answers: int
    """Ended well with fewer tokens than were asked for."""
    cached_prompt_share: float | None
    """Prompt tokens the server took from its prefix cache; None where it does not say."""
    latencies: dict[str, Quantiles | None]
    """By the names in `LATENCIES`."""
    single_token_share: float | None
    """Tokens that were read alone, at least; below 1, ITL is not per token."""
    objectives: str | None
    good: int | None
    goodput: float | None
    client_lag: Quantiles | None
    """How late requests were sent."""
    client_cpu_share: float
    """Of one core."""
    client_us_per_chunk: float | None
    interrupted: bool

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before comparing these numbers."""
        found: list[str] = []
        if self.client_cpu_share > BUSY_CLIENT:
            found.append(f"the client used {self.client_cpu_share:.0%} of a core: it is saturated")
        if self.client_lag is not None and self.client_lag.p99 > LATE_CLIENT_S:
            found.append(f"the client sent late: p99 {self.client_lag.p99 * 1e3:.0f} ms")
        if self.single_token_share is not None and self.single_token_share < 0.99:
            share = 1 - self.single_token_share
            found.append(
                f"up to {share:.0%} of the tokens came together or, past an ignored end, without "
                "text: read TPOT, not ITL"
            )
        if self.short_answers:
            found.append(f"{self.short_answers} answers are shorter than asked for")
        if self.interrupted:
            found.append("interrupted: requests still under way are left out")
        return found


def measure(load: str, run: LoadRun, objectives: Objectives | None = None) -> Point:
    """All numbers of one run."""
    samples = [s for s in run.samples if s.answer.outcome is not Outcome.STOPPED]
    answers = [sample.answer for sample in samples]
    well = [answer for answer in answers if answer.outcome is Outcome.OK]
    last = run.ended if run.interrupted else max((a.ended for a in answers), default=run.ended)
    seconds = max(last - run.began, 1e-9)
    output = sum(answer.tokens for answer in well)
    prompts = sum(_prompt_tokens(s) for s in samples if s.answer.outcome is Outcome.OK)
    good = sum(objectives.met(answer) for answer in answers) if objectives else None
    chunks = sum(len(answer.chunks) for answer in answers)
    return Point(
        load=load,
        sent=len(samples),
        outcomes=dict(Counter(str(answer.outcome) for answer in answers)),
        seconds=seconds,
        request_rate=len(well) / seconds,
        output_tokens_per_s=output / seconds,
        total_tokens_per_s=(prompts + output) / seconds,
        short_answers=_short(samples),
        cached_prompt_share=_cached_share(well),
        latencies={
            "ttft": quantiles(t for a in well if (t := ttft(a)) is not None),
            "itl": quantiles(gap for answer in well for gap in gaps(answer)),
            "tpot": quantiles(t for a in well if (t := tpot(a)) is not None),
            "e2e": quantiles(map(e2e, well)),
        },
        single_token_share=_single_token_share(well),
        objectives=str(objectives) if objectives else None,
        good=good,
        goodput=None if good is None else good / seconds,
        client_lag=quantiles(sample.lag_s for sample in samples),
        client_cpu_share=run.client_cpu_s / max(run.seconds, 1e-9),
        client_us_per_chunk=run.client_cpu_s / chunks * 1e6 if chunks else None,
        interrupted=run.interrupted,
    )


def _prompt_tokens(sample: Sample) -> int:
    counted = sample.answer.prompt_tokens
    return sample.request.input_tokens if counted is None else counted


def _short(samples: Sequence[Sample]) -> int:
    return sum(
        sample.answer.tokens < sample.request.output_tokens
        for sample in samples
        if sample.answer.outcome is Outcome.OK and sample.answer.completion_tokens is not None
    )


def _cached_share(answers: Sequence[Answer]) -> float | None:
    told = [a for a in answers if a.cached_tokens is not None and a.prompt_tokens]
    if not told:
        return None
    return sum(a.cached_tokens or 0 for a in told) / sum(a.prompt_tokens or 0 for a in told)


def _single_token_share(answers: Sequence[Answer]) -> float | None:
    told = [a for a in answers if a.completion_tokens]
    tokens = sum(a.completion_tokens or 0 for a in told)
    return max(0.0, 1 - sum(map(tokens_in_company, told)) / tokens) if tokens else None


def tokens_in_company(answer: Answer) -> int:
    """Tokens that were read together with others.

    Exact where the server counts tokens in every chunk. Else a bound from above: m tokens more than
    pieces of text are at most 2 m tokens in shared pieces.
    """
    sizes = [1] * len(answer.chunks)
    if answer.counts:
        sizes = [later - earlier for earlier, later in itertools.pairwise([0, *answer.counts])]
    reads: Counter[float] = Counter()
    for when, size in zip(answer.chunks, sizes, strict=True):
        reads[when] += size
    unseen = 0 if answer.counts else max(0, answer.tokens - len(answer.chunks))
    return sum(size for size in reads.values() if size > 1) + 2 * unseen


def requests_of(run: LoadRun) -> list[dict[str, Any]]:
    """One object for each request, times in seconds after the start of the run."""

    def after(time: float | None) -> float | None:
        return None if time is None or math.isnan(time) else round(time - run.began, 6)

    return [
        {
            "number": sample.request.number,
            "due_s": after(sample.due),
            "sent_s": after(sample.answer.sent),
            "first_s": after(sample.answer.chunks[0] if sample.answer.chunks else None),
            "ended_s": after(sample.answer.ended),
            "input_tokens": _prompt_tokens(sample),
            "cached_tokens": sample.answer.cached_tokens,
            "output_tokens": sample.answer.tokens,
            "outcome": str(sample.answer.outcome),
            **({"problem": sample.answer.problem} if sample.answer.problem else {}),
            **({"path": sample.answer.path} if sample.answer.path else {}),
        }
        for sample in run.samples
    ]
