"""What a request is told, and how long it waits, while the pool that serves it is at zero."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.registry import StartingWorker
from kvrelay_router.requests.admission import MAX_RETRY_S, MIN_RETRY_S
from kvrelay_router.requests.placement import Role
from kvrelay_router.requests.types import ColdStart, ValidRequest

TELL_EVERY_S = 0.2
"""Between two words about one phase of one pool's start."""
REQUESTED = "requested"
"""A process was asked for."""
WAKE = "wake"
"""A worker that sleeps was told to wake up."""


class StartClock:
    """How long starts of each pool take, by the last one. Times of one monotonic clock."""

    def __init__(self) -> None:
        self._began: dict[Role, float] = {}
        self._took_s: dict[Role, float] = {}

    def began(self, pool: Role, at: float) -> None:
        """A start was asked for; one that is under way goes on."""
        self._began.setdefault(pool, at)

    def ended(self, pool: Role, at: float) -> None:
        """A worker of the pool is there."""
        began = self._began.pop(pool, None)
        if began is not None:
            self._took_s[pool] = at - began

    def abandoned(self, pool: Role) -> None:
        """What is under way does not end, or is not measured."""
        self._began.pop(pool, None)

    def under_way(self, pool: Role) -> bool:
        """Whether one has begun and not ended."""
        return pool in self._began

    @property
    def took_s(self) -> Mapping[Role, float]:
        """The last start of each pool that had one."""
        return self._took_s

    def eta_s(self, pool: Role, now: float) -> float | None:
        """Seconds until a worker is there, were the start to take as long as the last; None before one."""
        took = self._took_s.get(pool)
        if took is None:
            return None
        return max(0.0, self._began.get(pool, now) + took - now)


class Parking:
    """Pure book-keeping: the service owns the requests and the clock."""

    def __init__(self, config: RouterConfig) -> None:
        self.on_demand: Callable[[], None] | None = None
        """Somebody who starts workers; None where nobody does. Told of every request that finds no place."""
        self._config = config
        self.starts = StartClock()
        self.wakings = StartClock()
        """The same of workers that slept."""
        self._told: dict[Role, ColdStart] = {}
        self._told_at: dict[Role, float] = {}

    @property
    def wakes(self) -> bool:
        """A pool at zero comes back when it is needed."""
        return self.on_demand is not None

    def demand(self) -> None:
        """A request found no place."""
        if self.on_demand is not None:
            self.on_demand()

    def wait_s(self, request: ValidRequest, allowed_s: float, *, parked: bool) -> float:
        """How long a first attempt may wait for a place.

        Args: `allowed_s` is what it may where workers are up and full.
        """
        longest = self._config.wake_timeout_s if parked and self.wakes else allowed_s
        return longest if request.wait_s is None else min(longest, request.wait_s)

    def retry_after_s(self, now: float) -> float:
        """When a decode worker may be there, within the bounds of every other such answer."""
        eta = self._clock(Role.DECODE).eta_s(Role.DECODE, now)
        return min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(eta or 0.0)))

    def requested(self, pool: Role, now: float, *, wake: bool = False) -> ColdStart:
        """Workers of the pool were asked for: processes, or that one wakes up."""
        (self.wakings if wake else self.starts).began(pool, now)
        phase = WAKE if wake else REQUESTED
        return self._tell(ColdStart(pool.value, phase, 0, 0, None), pool, now)

    def progress(self, worker: StartingWorker, now: float) -> ColdStart | None:
        """What to tell of a worker that starts; None while that was said a moment ago."""
        pool, last = worker.role, self._told.get(worker.role)
        self.starts.began(pool, now - worker.elapsed_s)
        self.wakings.abandoned(pool)  # whoever was to wake up is gone
        fresh = last is None or last.phase != worker.phase
        if not fresh and now - self._told_at[pool] < TELL_EVERY_S:
            return None
        said = ColdStart(pool.value, worker.phase, worker.done, worker.total, None)
        return self._tell(said, pool, now)

    def joined(self, pool: Role, now: float, *, woken: bool = False) -> None:
        """A worker of the pool is there: it has joined, or woken up."""
        ended, other = (self.wakings, self.starts) if woken else (self.starts, self.wakings)
        ended.ended(pool, now)
        other.abandoned(pool)
        self._told.pop(pool, None)

    def under_way(self, now: float) -> list[ColdStart]:
        """For a request that parks now: what the others were told last."""
        return [self._with_eta(said, pool, now) for pool, said in self._told.items()]

    def _tell(self, said: ColdStart, pool: Role, now: float) -> ColdStart:
        self._told[pool], self._told_at[pool] = said, now
        return self._with_eta(said, pool, now)

    def _with_eta(self, said: ColdStart, pool: Role, now: float) -> ColdStart:
        return replace(said, eta_s=self._clock(pool).eta_s(pool, now))

    def _clock(self, pool: Role) -> StartClock:
        """What is under way: a start, unless one that sleeps was told to wake up."""
        return self.wakings if self.wakings.under_way(pool) else self.starts
