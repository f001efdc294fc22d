"""The virtual clock: arrivals, prompts, transfers, steps, starts and decisions, in order of time."""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Protocol, TypeVar

from kvrelay_bench.serve.workload import PlannedRequest
from kvrelay_bench.simulate.fleet import Fleet
from kvrelay_bench.simulate.provider import Pool, Replica
from kvrelay_bench.simulate.totals import FleetTotals
from kvrelay_bench.simulate.workers import DecodeWorker, PrefillWorker, Request, make_request
from kvrelay_protocol.errors import UsageError
from kvrelay_router.config import RouterConfig
from kvrelay_router.requests.placement import Demand, WorkerState, place
from kvrelay_router.scaling import DemandMeter, FleetState, Targets

_COMPARED = 24
"""Up to so many workers of a pool are compared for each placement."""
_DRAWN = 8
"""Of a larger pool so many are drawn by lot, which spreads load nearly as well (the power of d choices,
Mitzenmacher 2001) and never in the policy's favour.
"""


_W = TypeVar("_W")


class Policy(Protocol):
    """Decides on replicas, called every so often and when a request is parked."""

    def targets(self, state: FleetState, now: float) -> Targets: ...

    @property
    def every_s(self) -> float | None:
        """How often it looks; None: every `Fleet.decide_every_s`."""
        ...

    @property
    def resting(self) -> bool:
        """Whether it will say the same until a request comes, if there is none and it was obeyed."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """What one policy made of one load."""

    requests: Sequence[Request]
    prefill: Pool[PrefillWorker]
    decode: Pool[DecodeWorker]
    ended_at: float

    def gpu_seconds(self, begin: float = 0.0) -> float:
        """What was paid from that moment on, both pools."""
        return self.prefill.gpu_seconds_from(begin) + self.decode.gpu_seconds_from(begin)


class Simulation:
    """One load on one fleet under one policy. Open loop: nobody waits with asking."""

    def __init__(self, fleet: Fleet, policy: Policy, *, seed: int = 0) -> None:
        self._fleet = fleet
        self._policy = policy
        self._every_s = fleet.decide_every_s if policy.every_s is None else policy.every_s
        self._random = random.Random(seed)
        self._router = RouterConfig(model_dir=FilePath(), model_name="simulated")
        rates = fleet.rates
        self._totals = totals = FleetTotals()
        self._prefill: Pool[PrefillWorker] = Pool(
            fleet.prefill,
            lambda number, _now: PrefillWorker(f"prefill-{number}", rates, totals.changed),
            totals.forget,
        )
        self._decode: Pool[DecodeWorker] = Pool(
            fleet.decode,
            lambda number, now: DecodeWorker(f"decode-{number}", rates, totals.changed, now),
            totals.forget,
        )
        self._by_name: dict[str, PrefillWorker | DecodeWorker] = {}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._line: deque[Request] = deque()
        self._line_tokens = 0
        self._line_blocks = 0
        self._meter = DemandMeter()
        self._arrived = 0
        self._live = 0
        self._uncomputed = 0
        """Requests whose prompt is not computed yet."""
        self._transferring = 0
        self._idle_since = 0.0
        self._prompts_idle_since = 0.0
        self._next_tick = 0.0
        self._ticking = False
        """It does not while there is nothing to decide on."""

    def run(self, plans: Sequence[PlannedRequest]) -> Run:
        """Serve all of it.

        Raises:
            UsageError: a request that no worker can ever hold.
        """
        requests = [make_request(plan, self._fleet.rates) for plan in plans]
        for request in requests:
            if request.blocks > self._fleet.rates.blocks:
                raise UsageError(
                    f"request {request.plan.number} needs {request.blocks} KV blocks, a worker of "
                    f"this fleet has {self._fleet.rates.blocks}: raise rates.blocks"
                )
        self._prefill.begin(self._fleet.prefill.initial)
        self._decode.begin(self._fleet.decode.initial)
        self._by_name.update({worker.name: worker for worker in self._prefill.ready})
        self._by_name.update({worker.name: worker for worker in self._decode.ready})
        self._tick(0.0)
        arriving = deque(requests)
        now = 0.0
        while arriving or self._live:
            event_at = self._events[0][0] if self._events else math.inf
            if arriving and arriving[0].plan.arrival_s <= event_at:
                request = arriving.popleft()
                now = request.plan.arrival_s
                self._arrive(request, now)
                continue
            now, _, handle = heapq.heappop(self._events)
            handle(now)
        self._prefill.close(now)
        self._decode.close(now)
        return Run(requests, self._prefill, self._decode, now)

    # ---- events

    def _at(self, when: float, handle: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), handle))

    def _tick(self, now: float) -> None:
        self._decide(now)
        busy = self._live or self._prefill.paid or self._decode.paid
        self._ticking = bool(busy) and not self._rests(now)
        self._next_tick = now + self._every_s
        if self._ticking:
            self._at(self._next_tick, self._tick)

    def _rests(self, now: float) -> bool:
        pools = self._prefill, self._decode
        return (
            self._policy.resting
            and not self._live
            and not any(pool.pending or pool.leaving for pool in pools)
            and not self._meter.tokens_per_second(now)
        )

    def _wake(self, now: float) -> None:
        """Decide when it would have been decided last, had nobody rested; then every so often again."""
        every = self._every_s
        if self._prefill.paid or self._decode.paid:
            missed = math.floor((now - self._next_tick) / every)
            if missed >= 0:
                self._decide(self._next_tick + missed * every)
            self._at(self._next_tick + (missed + 1) * every, self._tick)
        else:
            self._at(now + every, self._tick)
        self._ticking = True

    def _arrive(self, request: Request, now: float) -> None:
        if not self._ticking:
            self._wake(now)
        self._live += 1
        self._arrived += 1
        self._uncomputed += 1
        self._meter.arrived(now, request.plan.input_tokens)
        request.parked = not self._decode.ready
        if self._line or not self._place(request, now):
            self._line.append(request)
            self._line_tokens += request.plan.input_tokens
            self._line_blocks += request.prompt_blocks
        if not self._decode.desired:
            self._decide(now)  # as the router does: nobody waits for the clock to be woken

    def _joined_prefill(self, start: Replica, now: float) -> None:
        worker = self._prefill.joined(start, now)
        if worker is not None:
            self._by_name[worker.name] = worker

    def _joined_decode(self, start: Replica, now: float) -> None:
        worker = self._decode.joined(start, now)
        if worker is not None:
            self._by_name[worker.name] = worker
            self._pump(now)

    def _prompt_done(self, worker: PrefillWorker, now: float) -> None:
        request, following = worker.finish()
        if following is not None:
            self._at(now + following.computed_s, lambda at: self._prompt_done(worker, at))
        self._first_token(request, now)
        request.prefilled = True
        self._transferring += 1
        if request.granted:
            self._transfer(request, now)
        self._prefill.sweep(worker, now)

    def _transfer(self, request: Request, now: float) -> None:
        seconds = self._fleet.rates.transfer_s(request.plan.input_tokens)
        self._at(now + seconds, lambda at: self._transferred(request, at))

    def _transferred(self, request: Request, now: float) -> None:
        self._transferring -= 1
        worker = self._decode_worker(request)
        worker.join(request, now)
        self._time(worker)

    def _stepped(self, worker: DecodeWorker, version: int, now: float) -> None:
        if worker.version != version:
            return
        prompts, ended, granted = worker.step(now)
        for request in prompts:
            self._first_token(request, now)
        for request in ended:
            request.done_at = now
            self._live -= 1
        if not self._live:
            self._idle_since = now
        self._granted(granted, now)
        self._time(worker)
        if ended:
            self._pump(now)
            self._decode.sweep(worker, now)

    def _first_token(self, request: Request, now: float) -> None:
        request.first_at = now
        self._uncomputed -= 1
        if not self._uncomputed:
            self._prompts_idle_since = now
        prompt = request.plan.input_tokens
        self._meter.computed(now, prompt=prompt, cached=prompt - request.computed_tokens)

    def _time(self, worker: DecodeWorker) -> None:
        when, version = worker.next_at(), worker.version
        if when is not None:
            self._at(when, lambda at: self._stepped(worker, version, at))

    # ---- placing

    def _pump(self, now: float) -> None:
        while self._line and self._place(self._line[0], now):
            request = self._line.popleft()
            self._line_tokens -= request.plan.input_tokens
            self._line_blocks -= request.prompt_blocks

    def _place(self, request: Request, now: float) -> bool:
        path = place(Demand(request.plan.input_tokens), self._candidates(), self._router)
        if path is None:
            return False
        request.path = path
        if path.prefill_worker is not None:
            prefill = self._by_name[path.prefill_worker]
            if not isinstance(prefill, PrefillWorker):
                raise TypeError(f"{prefill.name} is no prefill worker")
            if prefill.submit(request):
                self._at(now + request.computed_s, lambda at: self._prompt_done(prefill, at))
        decode = self._decode_worker(request)
        self._granted(decode.submit(request), now)
        return True

    def _granted(self, requests: Sequence[Request], now: float) -> None:
        for request in requests:
            worker = self._decode_worker(request)
            if request.path is not None and request.path.prefill_worker is None:
                worker.compute(request, now)
                self._time(worker)
            elif request.prefilled:
                self._transfer(request, now)

    def _decode_worker(self, request: Request) -> DecodeWorker:
        worker = self._by_name[request.path.decode_worker] if request.path else None
        if not isinstance(worker, DecodeWorker):
            raise TypeError(f"request {request.plan.number} has no decode worker")
        return worker

    def _candidates(self) -> list[WorkerState]:
        return [
            *(worker.state() for worker in self._some(self._prefill.ready)),
            *(worker.state() for worker in self._some(self._decode.ready)),
        ]

    def _some(self, workers: list[_W]) -> list[_W]:
        if len(workers) <= _COMPARED:
            return workers
        return self._random.sample(workers, _DRAWN)

    # ---- deciding

    def _decide(self, now: float) -> None:
        targets = self._policy.targets(self._observe(now), now)
        self._arrived = 0
        for start in self._prefill.scale(targets.prefill, now):
            self._at(start.ready_at, lambda at, s=start: self._joined_prefill(s, at))  # type: ignore[misc]
        for start in self._decode.scale(targets.decode, now):
            self._at(start.ready_at, lambda at, s=start: self._joined_decode(s, at))  # type: ignore[misc]

    def _observe(self, now: float) -> FleetState:
        return FleetState(
            prefill=self._prefill.state(),
            decode=self._decode.state(),
            prefill_load=self._totals.prefill_load(
                parked_tokens=self._line_tokens,
                arriving_tokens_per_second=self._meter.tokens_per_second(now),
                idle_s=0.0 if self._uncomputed else now - self._prompts_idle_since,
            ),
            decode_load=self._totals.decode_load(
                parked_blocks=self._line_blocks,
                idle_s=0.0 if self._live else now - self._idle_since,
            ),
            parked=len(self._line),
            transferring=self._transferring,
            arrived=self._arrived,
        )
