"""One pool's replicas over time: starting, asleep, ready, draining, and what they have cost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from kvrelay_bench.simulate.fleet import PoolFleet
from kvrelay_router.scaling import PoolState

FLAP_S = 300.0
"""A scale-up this soon after a scale-down is a flap: what was stopped was needed."""


class _Worker(Protocol):
    name: str

    def drain(self) -> None: ...

    @property
    def load(self) -> int: ...

    @property
    def empty(self) -> bool: ...


_W = TypeVar("_W", bound=_Worker)


@dataclass(slots=True)
class Replica:
    """A start in progress."""

    asked_at: float
    ready_at: float
    asleep: bool
    cancelled: bool = False


@dataclass(slots=True)
class Pool(Generic[_W]):
    """Obeys targets as a provider does: starts take time, stops wait for what runs."""

    fleet: PoolFleet
    make: Callable[[int, float], _W]
    """From the worker's number and the time."""
    gone: Callable[[_W], None] = lambda _worker: None
    """Told of each that has drained."""
    desired: int = 0
    ready: list[_W] = field(default_factory=list)
    leaving: dict[_W, None] = field(default_factory=dict)
    pending: list[Replica] = field(default_factory=list)
    starts: int = 0
    flaps: int = 0
    peak: int = 0
    timeline: list[tuple[float, int]] = field(default_factory=list)
    """(time, replicas that are paid for), at every change."""
    _made: int = 0
    _asleep: int = 0
    _shrunk_at: float | None = None
    _start_s: float | None = None
    _state: PoolState | None = None

    def begin(self, replicas: int) -> None:
        """Ready when the trace begins; the other processes that may sleep do."""
        self.ready = [self._new(0.0) for _ in range(replicas)]
        self.desired = replicas
        self._asleep = max(0, self.fleet.sleepers - replicas)
        self._changed(0.0)

    @property
    def paid(self) -> int:
        """A GPU is paid for from the start of a replica until it is gone."""
        return len(self.ready) + len(self.leaving) + len(self.pending)

    def state(self) -> PoolState:
        if self._state is None:
            self._state = PoolState(
                ready=len(self.ready),
                pending=tuple(start.asked_at for start in self.pending),
                draining=len(self.leaving),
                desired=self.desired,
                start_s=self._start_s,
            )
        return self._state

    def scale(self, target: int, now: float) -> list[Replica]:
        """Returns the starts that the caller has to time."""
        if target == self.desired:
            return []
        if target > self.desired:
            if self._shrunk_at is not None and now - self._shrunk_at < FLAP_S:
                self.flaps += 1
            self._shrunk_at = None
        else:
            self._shrunk_at = now
        self.desired = target
        started = [self._start(now) for _ in range(target - len(self.ready) - len(self.pending))]
        for worker in self._stop(len(self.ready) + len(self.pending) - target):
            self.sweep(worker, now)
        self._changed(now)
        return started

    def joined(self, start: Replica, now: float) -> _W | None:
        """The worker, or None where its start was cancelled."""
        if start.cancelled:
            return None
        self.pending.remove(start)
        self._start_s = now - start.asked_at
        worker = self._new(now)
        self.ready.append(worker)
        self._changed(now)
        return worker

    def sweep(self, worker: _W, now: float) -> None:
        """Let go of it where it has drained."""
        if worker not in self.leaving or not worker.empty:
            return
        del self.leaving[worker]
        self._asleep = min(self.fleet.sleepers, self._asleep + 1)
        self.gone(worker)
        self._changed(now)

    def close(self, now: float) -> None:
        """The run has ended."""
        self._changed(now)

    def gpu_seconds_from(self, begin: float) -> float:
        """What was paid from that moment to the end of the run."""
        ends = [when for when, _ in self.timeline[1:]] + [self.timeline[-1][0]]
        return sum(
            replicas * max(0.0, until - max(when, begin))
            for (when, replicas), until in zip(self.timeline, ends, strict=True)
        )

    def _start(self, now: float) -> Replica:
        asleep = self._asleep > 0
        self._asleep -= asleep
        takes = self.fleet.wake_s if asleep else self.fleet.cold_start_s
        start = Replica(now, now + takes, asleep)
        self.pending.append(start)
        self.starts += 1
        return start

    def _stop(self, count: int) -> list[_W]:
        """Cancel starts, the last first, then have the least loaded workers drain; returns these."""
        if count <= 0:
            return []
        for _ in range(min(count, len(self.pending))):
            start = self.pending.pop()
            start.cancelled = True
            self._asleep += start.asleep
            count -= 1
        stopped = sorted(self.ready, key=lambda w: (w.load, w.name))[:count]
        for worker in stopped:
            worker.drain()
            self.leaving[worker] = None
        self.ready = [worker for worker in self.ready if worker not in self.leaving]
        return stopped

    def _new(self, now: float) -> _W:
        self._made += 1
        return self.make(self._made - 1, now)

    def _changed(self, now: float) -> None:
        self._state = None
        self.peak = max(self.peak, self.paid)
        self.timeline.append((now, self.paid))
