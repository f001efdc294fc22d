"""What could have been had: the cheapest plan of somebody who knows every arrival beforehand.

The oracle is told, of a run that has been simulated, what each request turned out to cost: seconds
of prompt computation after the prefix cache, blocks and time of its stream. It chooses whole replicas
for every bin of time and pays for them, and for the time of a start whenever it adds one; but it
starts early enough for each to be ready when it is needed. It is a lower bound for a scaler that serves
the same streams in time, up to the width of a bin, because everything else is in its favour:

- work is a fluid: it divides among workers without rest, waits in no order, and is served at the
  latest moment that its time limit allows (earliest deadline first, which is optimal);
- a worker may be filled to the last block and up to the limit on the time per token, without headroom;
- starts take their nominal time, stopping is instantaneous, nothing has to drain;
- the fleet's minima do not bind it: it may go to zero at any time.

There are two such plans, of one pool and of two, each for the whole trace; the cheaper one is the oracle.
Decode workers can compute prompts; in one pool decoding is taken to be undisturbed by them. What is
cheapest with two pools is reported as well: it is what a fleet that must keep them apart compares with.

When streams run is taken from the run and not rearranged, which is the one thing a cleverer plan could
gain by; in a load of hours with a handful of requests a bin is longer than what they take, and the
bound means nothing.

It serves *every* request in time. A plan that may fail one in a hundred could be cheaper still by what
these take; which ones they are is a knapsack problem that is not solved here.

Method: dynamic programming over (bin, replicas, backlog), exact but for the grid on which cumulative
work is rounded down, and for fleets beyond 32 replicas, which are planned in equal granules.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvrelay_bench.simulate.fleet import Fleet, Rates, Slo
from kvrelay_bench.simulate.workers import Request
from kvrelay_router.scaling import Targets

_BINS = 4000
_LEVELS = 32
_GRID = 256
"""Backlogs that the plan tells apart, about."""

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Plan:
    """Replicas of each pool in each bin."""

    bin_s: float
    replicas: Sequence[Targets]
    gpu_seconds: float
    """Starts included."""
    aggregated: bool
    """One pool, which is under `decode`."""

    def gpu_seconds_from(self, begin: float, fleet: Fleet) -> float:
        """What the plan takes from that moment on, starts included."""
        first = int(begin / self.bin_s)
        before = (
            self.replicas[first - 1]
            if first
            else Targets(fleet.prefill.initial, fleet.decode.initial)
        )
        total = 0.0
        for now in self.replicas[first:]:
            total += (now.prefill + now.decode) * self.bin_s
            total += max(0, now.prefill - before.prefill) * fleet.prefill.start_s
            total += max(0, now.decode - before.decode) * fleet.decode.start_s
            before = now
        return total

    @property
    def peak(self) -> Targets:
        return Targets(max(t.prefill for t in self.replicas), max(t.decode for t in self.replicas))


@dataclass(frozen=True, slots=True)
class Clairvoyant:
    """The cheapest plan of either shape."""

    together: Plan
    apart: Plan | None
    """None: the fleet has no prefill pool."""

    @property
    def best(self) -> Plan:
        """The oracle."""
        if self.apart is None or self.together.gpu_seconds < self.apart.gpu_seconds:
            return self.together
        return self.apart


@dataclass(frozen=True, slots=True)
class Work:
    """What one pool must do, per bin."""

    arriving_s: Sequence[float]
    """Worker-seconds that arrive."""
    floor: Sequence[int]
    """Replicas that must be there whatever the work."""


def clairvoyant(fleet: Fleet, requests: Sequence[Request], ended_at: float) -> Clairvoyant:
    """The cheapest plans for requests that have been through a run.

    Args:
        fleet: rates, limits and what starts take.
        requests: of the run, all done.
        ended_at: of the run, in seconds.
    """
    bin_s = max(1.0, ended_at / _BINS)
    bins = math.ceil(ended_at / bin_s) + 1
    prompts = _binned(bins, bin_s, ((r.plan.arrival_s, r.computed_s) for r in requests))
    streams = _streams(fleet.rates, fleet.slo, requests, bins, bin_s)
    limit, pools = fleet.slo.ttft_s, (fleet.prefill, fleet.decode)
    steps = _binned(bins, bin_s, _step_work(fleet.rates, requests))
    both = Work([a + b for a, b in zip(prompts, steps, strict=True)], streams)
    merged, merged_s = cheapest(both, bin_s, limit, pools[1].start_s, pools[1].initial)
    together = Plan(bin_s, [Targets(0, n) for n in merged], merged_s, aggregated=True)
    if fleet.prefill.max == 0:
        return Clairvoyant(together, None)
    alone, unhurried = Work(prompts, [0] * bins), Work([0.0] * bins, streams)
    prefill, prefill_s = cheapest(alone, bin_s, limit, pools[0].start_s, pools[0].initial)
    decode, decode_s = cheapest(unhurried, bin_s, limit, pools[1].start_s, pools[1].initial)
    replicas = [Targets(p, d) for p, d in zip(prefill, decode, strict=True)]
    return Clairvoyant(together, Plan(bin_s, replicas, prefill_s + decode_s, aggregated=False))


def cheapest(
    work: Work, bin_s: float, limit_s: float, start_s: float, initial: int
) -> tuple[list[int], float]:
    """Whole replicas per bin that do all work within `limit_s` of its arrival, and their seconds.

    Args:
        work: arrivals and floors, of the same number of bins.
        bin_s: width of a bin.
        limit_s: longest time from arrival to end, of the fluid.
        start_s: what adding a replica costs.
        initial: replicas that are there before the first bin and need no start.
    """
    arriving = list(work.arriving_s) + [0.0] * (math.ceil(limit_s / bin_s) + 1)
    floor = list(work.floor) + [0] * (len(arriving) - len(work.floor))
    peak = max(*floor, math.ceil(max(arriving) / bin_s), 1)
    granule = max(1, math.ceil(peak / _LEVELS))
    levels = math.ceil(peak / granule)
    bounds = _windows(arriving, max(1, math.floor(limit_s / bin_s)))
    fine = max(1, min(8, math.floor(_GRID * granule * bin_s / max(*bounds, 1e-9))))
    unit = granule * bin_s / fine
    done = np.floor(np.cumsum([0.0, *arriving]) / unit).astype(int)
    coming = np.diff(done)
    allowed = [math.ceil(bound / unit) for bound in bounds]
    floors = [math.ceil(f / granule) for f in floor]
    counts, cost = _solve(
        coming.tolist(), allowed, floors, levels, fine,
        hold=granule * bin_s, start=granule * start_s, initial=math.ceil(initial / granule),
    )  # fmt: skip
    return [n * granule for n in counts[: len(work.floor)]], cost


def _solve(
    coming: Sequence[int],
    allowed: Sequence[int],
    floors: Sequence[int],
    levels: int,
    fine: int,
    *,
    hold: float,
    start: float,
    initial: int,
) -> tuple[list[int], float]:
    """Least sum of hold * n + start * (growth of n), n from 0 to `levels` a bin."""
    width = max(allowed) + 1
    cost = np.full((levels + 1, width), np.inf)
    cost[min(initial, levels), 0] = 0.0
    came: list[tuple[npt.NDArray[np.int8], npt.NDArray[np.int16]]] = []
    for work, most, floor in zip(coming, allowed, floors, strict=True):
        moved, source = _move(cost, start)
        cost = np.full_like(cost, np.inf)
        emptied = np.zeros(levels + 1, dtype=np.int16)
        for n in range(floor, levels + 1):
            emptied[n] = _serve(moved[n], cost[n], n * fine - work, most)
        cost += hold * np.arange(levels + 1)[:, None]
        came.append((source, emptied))
    end = int(np.argmin(cost[:, 0]))
    return _backtrack(came, coming, fine, end), float(cost[end, 0])


def _move(cost: _Array, start: float) -> tuple[_Array, npt.NDArray[np.int8]]:
    """Cost after the best change of replicas, and how many there were before it."""
    moved = cost.copy()
    source = np.broadcast_to(np.arange(len(cost), dtype=np.int8)[:, None], cost.shape).copy()
    for n in range(len(cost) - 2, -1, -1):  # letting go costs nothing
        better = moved[n + 1] < moved[n]
        moved[n][better], source[n][better] = moved[n + 1][better], source[n + 1][better]
    for n in range(1, len(cost)):
        better = moved[n - 1] + start < moved[n]
        moved[n][better] = moved[n - 1][better] + start
        source[n][better] = source[n - 1][better]
    return moved, source


def _serve(before: _Array, after: _Array, served: int, most: int) -> int:
    """Backlogs after a bin that does `served` more than arrives; returns which one best ended empty."""
    width = len(before)
    if served <= 0:
        keep = max(0, min(width, most + 1) + served)
        after[-served : -served + keep] = before[:keep]
        return 0
    top = min(width - served, most + 1)
    if top > 0:
        after[:top] = before[served : served + top]
    emptied = int(np.argmin(before[: min(served, width - 1) + 1]))
    after[0] = before[emptied]
    return emptied


def _backtrack(
    came: Sequence[tuple[npt.NDArray[np.int8], npt.NDArray[np.int16]]],
    coming: Sequence[int],
    fine: int,
    end: int,
) -> list[int]:
    counts, n, backlog = [], end, 0
    for (source, emptied), work in zip(reversed(came), reversed(coming), strict=True):
        counts.append(n)
        served = n * fine - work
        backlog = int(emptied[n]) if backlog == 0 and served > 0 else backlog + served
        n = int(source[n, backlog])
    return counts[::-1]


def _windows(values: Sequence[float], width: int) -> list[float]:
    """Sum of the last `width` values at each place: what may still be waiting."""
    recent: deque[float] = deque(maxlen=width)
    sums = []
    for value in values:
        recent.append(value)
        sums.append(math.fsum(recent))
    return sums


def _binned(bins: int, bin_s: float, items: Iterable[tuple[float, float]]) -> list[float]:
    values = [0.0] * bins
    for when, amount in items:
        values[min(bins - 1, int(when / bin_s))] += amount
    return values


def _streams(
    rates: Rates, slo: Slo, requests: Sequence[Request], bins: int, bin_s: float
) -> list[int]:
    """Decode workers without which blocks or the time per token would not do, from peak to peak."""
    changes: list[tuple[float, int, float]] = []
    for request in requests:
        context = request.plan.input_tokens + request.plan.output_tokens / 2
        seconds = rates.decode_step_s(1, context) - rates.step_s
        changes.append((request.first_at, request.blocks, seconds))
        changes.append((request.done_at, -request.blocks, -seconds))
    spare = max(slo.tpot_s - rates.step_s, 1e-9)
    floors, blocks, seconds, now_bin = [0] * bins, 0, 0.0, 0
    live = 0
    for when, added, cost in sorted(changes):
        place = min(bins - 1, int(when / bin_s))
        needed = max(1, _workers(blocks, seconds, rates, spare)) if live else 0
        for between in range(now_bin, place + 1):
            floors[between] = max(floors[between], needed)
        now_bin = place
        blocks, seconds, live = blocks + added, seconds + cost, live + (1 if added > 0 else -1)
        floors[place] = max(floors[place], 1, _workers(blocks, seconds, rates, spare))
    return floors


def _workers(blocks: int, seconds: float, rates: Rates, spare: float) -> int:
    return max(math.ceil(blocks / rates.blocks), math.ceil(seconds / spare - 1e-6))


def _step_work(rates: Rates, requests: Sequence[Request]) -> Iterable[tuple[float, float]]:
    """Seconds that each stream adds to the steps it takes part in, at its start."""
    for request in requests:
        context = request.plan.input_tokens + request.plan.output_tokens / 2
        each = rates.decode_step_s(1, context) - rates.step_s
        yield request.first_at, each * (request.plan.output_tokens - 1)
