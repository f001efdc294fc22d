"""Loads drawn from a seed: the patterns that scalers get wrong. Open loop, as all loads here."""

import math
import random
from collections.abc import Callable, Iterator, Mapping

from kvrelay_bench.serve.workload import PlannedRequest

HOUR = 3600.0


def _poisson(
    generator: random.Random, seconds: float, rate: Callable[[float], float], peak: float
) -> Iterator[float]:
    """Arrival times of a Poisson process of varying rate, by thinning (Lewis and Shedler 1979)."""
    now = 0.0
    while (now := now + generator.expovariate(peak)) < seconds:
        if generator.random() * peak < rate(now):
            yield now


def _request(
    generator: random.Random, number: int, when: float, prompt: int, output: int
) -> PlannedRequest:
    """Lengths around the given ones, exponential as in the published traces, at least 1."""
    return PlannedRequest(
        number,
        when,
        max(1, min(8 * prompt, round(generator.expovariate(1 / prompt)))),
        max(1, min(8 * output, round(generator.expovariate(1 / output)))),
    )


def lone(seed: int) -> list[PlannedRequest]:
    """One request, five hours of nothing, another one."""
    generator = random.Random(seed)
    return [_request(generator, n, n * 5 * HOUR, 2000, 200) for n in range(2)]


def square(seed: int) -> list[PlannedRequest]:
    """45 s of load and 45 s of none, near the time of a cold start, for an hour."""
    generator = random.Random(seed)
    times = _poisson(generator, HOUR, lambda t: 6.0 if t % 90 < 45 else 0.0, 6.0)
    return [_request(generator, n, t, 2000, 150) for n, t in enumerate(times)]


def step(seed: int) -> list[PlannedRequest]:
    """Ten times the load from one moment to the next, for the middle third of an hour and a half."""
    generator = random.Random(seed)
    times = _poisson(generator, 1.5 * HOUR, lambda t: 20.0 if HOUR / 2 <= t < HOUR else 2.0, 20.0)
    return [_request(generator, n, t, 2000, 150) for n, t in enumerate(times)]


def diurnal(seed: int) -> list[PlannedRequest]:
    """Two days of a sine between nothing at night and its peak at noon."""
    generator = random.Random(seed)

    def rate(t: float) -> float:
        return max(0.0, 1.2 * (1 - math.cos(2 * math.pi * t / (24 * HOUR))) - 0.2)

    times = _poisson(generator, 48 * HOUR, rate, 2.4)
    return [_request(generator, n, t, 2000, 200) for n, t in enumerate(times)]


def swap(seed: int) -> list[PlannedRequest]:
    """Long prompts with short answers, then short prompts with long answers, for an hour each."""
    generator = random.Random(seed)
    times = _poisson(generator, 2 * HOUR, lambda _t: 8.0, 8.0)
    return [
        _request(generator, n, t, *((8000, 30) if t < HOUR else (300, 1200)))
        for n, t in enumerate(times)
    ]


LOADS: Mapping[str, Callable[[int], list[PlannedRequest]]] = {
    "lone": lone, "square": square, "step": step, "diurnal": diurnal, "swap": swap,
}  # fmt: skip


def multiply(plans: list[PlannedRequest], copies: int, seed: int) -> list[PlannedRequest]:
    """Each request so many times, the copies shifted by up to a minute, with prefixes of their own."""
    generator = random.Random(seed)
    step_of = 1 + max((block for plan in plans for block in plan.blocks), default=0)
    many = [
        (
            plan.arrival_s + (generator.uniform(0, 60) if copy else 0),
            plan,
            tuple(b + copy * step_of for b in plan.blocks),
        )
        for plan in plans
        for copy in range(copies)
    ]
    many.sort(key=lambda item: item[0])
    return [
        PlannedRequest(n, t, p.input_tokens, p.output_tokens, blocks, p.block_tokens)
        for n, (t, p, blocks) in enumerate(many)
    ]
