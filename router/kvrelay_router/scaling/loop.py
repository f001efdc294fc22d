"""Looks at the fleet, decides, and tells the provider: the only writer of how many replicas there are.

It decides once a second, and at once when a request finds no place: a start that waits for a poll costs
the client the poll.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.fleet.slumber import Rest
from kvrelay_router.fleet.worker_link import WorkerLink
from kvrelay_router.requests.demand import FleetDemand
from kvrelay_router.requests.placement import Role
from kvrelay_router.scaling.config import ScalerConfig
from kvrelay_router.scaling.observe import decode_load, prefill_load
from kvrelay_router.scaling.policy import decide
from kvrelay_router.scaling.rest import rest
from kvrelay_router.scaling.state import FleetState, Memory, PoolState

TICK_S = 1.0
ADOPT_S = 2.0
"""Workers dial a router that is back several times a second."""
RETRY_S = 1.0
"""After a provider that failed."""

logger = logging.getLogger(__name__)


class Provider(Protocol):
    """Whoever starts and stops workers."""

    async def scale(self, pool: str, replicas: int) -> None:
        """Have that many workers of `prefill` or `decode` from now on, those that sleep included. Idempotent;
        returns once it is asked for, and not when they are up.
        """


class ScalingListener(Protocol):
    """Who hears of decisions. Called on the event loop; must neither block nor raise."""

    def start_requested(self, pool: Role, *, wake: bool) -> None:
        """A pool without workers that are awake was given some.

        Args: `wake` where one that sleeps wakes up, rather than a process being started.
        """

    def scaled(self, pool: Role, replicas: int, reason: str) -> None:
        """The provider took a new number."""

    def scaling_failed(self, pool: Role) -> None:
        """It did not."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Everything the router must be given to have workers started."""

    config: ScalerConfig
    provider: Provider
    running: Mapping[Role, int] | None
    """Workers that the provider was told to run, by whoever started this router; None where nobody knows, and
    nothing is decided before `ADOPT_S`. Who joins until then counts as asked for.
    """


class ScalerLoop:
    """Owns the scaler's memory and what the provider was told last. One event loop runs it."""

    def __init__(
        self,
        scaling: Scaling,
        registry: WorkerRegistry,
        demand: Callable[[float], FleetDemand],
        listener: ScalingListener,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = scaling.config
        self._provider = scaling.provider
        self._registry = registry
        self._demand = demand
        self._listener = listener
        self._clock = clock
        self._memory = Memory()
        self._desired = dict(scaling.running or {})
        self._kept = dict.fromkeys(Role, 0)
        """Processes that the provider was told to run besides, asleep."""
        self._missing_since: dict[Role, list[float]] = {role: [] for role in Role}
        """Since when each replica that was asked for is not there, oldest first: one that has run and
        died has as long to come back as a new one.
        """
        self._adopt_until = clock() + ADOPT_S
        self._nudged = asyncio.Event()

    @property
    def desired(self) -> Mapping[Role, int]:
        """What the provider was told last, less those that it keeps for us to sleep."""
        return self._desired

    def nudge(self) -> None:
        """Decide now."""
        self._nudged.set()

    async def run(self) -> None:
        """Until cancelled."""
        if not self._desired:
            await self._adopt()
        while True:
            self._nudged.clear()
            try:
                told = await self._once()
            except Exception:
                # A defect of one decision must not leave the pools as they are for good.
                logger.exception("the scaler could not decide")
                told = False
            # A provider that fails is not asked again for every request that comes.
            if not told:
                await asyncio.sleep(RETRY_S)
                continue
            # Not `wait_for`, which may lose a cancel that comes together with a nudge.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._nudged.wait()

    async def _adopt(self) -> None:
        """Take for asked what is there: a router that starts again must not end what it finds."""
        await asyncio.sleep(ADOPT_S)
        for role in Role:
            self._desired[role] = max(self._joined(role), self._config.pool(role).min)
            while not await self._tell(role, self._desired[role], 0, "found"):  # noqa: ASYNC110 - not a condition: asked anew
                await asyncio.sleep(RETRY_S)

    def _joined(self, role: Role) -> int:
        return sum(link.awake for link in self._staying(role))

    def _asleep(self, role: Role) -> int:
        return sum(not link.awake for link in self._staying(role))

    def _staying(self, role: Role) -> list[WorkerLink]:
        return [k for k in self._registry.links if k.role is role and not k.draining]

    async def _once(self) -> bool:
        """Decide and tell the provider. Returns whether it took everything."""
        now = self._clock()
        before = self._memory
        decision = decide(self._observe(now), now, self._config, before)
        self._memory = decision.memory
        told = True
        # Decode first: one decode worker alone serves everything.
        for role in (Role.DECODE, Role.PREFILL):
            wanted, kept = decision.targets.of(role), decision.targets.asleep(role)
            woken = rest(self._registry, self._staying(role), wanted, kept)
            if (wanted, kept) == (self._desired[role], self._kept[role]):
                continue
            if not await self._tell(role, wanted, kept, decision.reasons.of(role), wake=woken):
                self._memory = _undecided(self._memory, role, before)
                told = False
        return told

    async def _tell(
        self, role: Role, wanted: int, kept: int, reason: str, *, wake: bool = False
    ) -> bool:
        before = self._desired[role]
        if not before and wanted:
            self._listener.start_requested(role, wake=wake)
        # To fall asleep and to wake up is between us and the worker: the provider keeps its process.
        if reason == "found" or wanted + kept != before + self._kept[role]:
            try:
                await self._provider.scale(role.value, wanted + kept)
            except Exception:
                logger.exception("%s could not be scaled from %d to %d", role.value, before, wanted)
                self._listener.scaling_failed(role)
                return False
        self._desired[role], self._kept[role] = wanted, kept
        self._missing(role, self._clock())
        if wanted != before or reason == "found":
            self._listener.scaled(role, wanted, reason)
        return True

    def _observe(self, now: float) -> FleetState:
        if now < self._adopt_until:
            for role in Role:
                self._desired[role] = max(self._desired[role], self._joined(role))
                self._kept[role] = max(self._kept[role], self._asleep(role))
        workers = self._registry.states()
        demand = self._demand(now)
        prefill = self._pool(Role.PREFILL, demand, now)
        decode = self._pool(Role.DECODE, demand, now)
        return FleetState(
            prefill=prefill,
            decode=decode,
            prefill_load=prefill_load(
                workers,
                parked_tokens=demand.waiting_tokens,
                arriving_tokens_per_second=demand.arriving_tokens_per_second,
                # A pool that is on its way is not idle yet, or a start longer than that never ended.
                idle_s=0.0 if prefill.pending else demand.prompts_idle_s,
            ),
            decode_load=decode_load(
                workers,
                parked_blocks=demand.waiting_blocks,
                idle_s=0.0 if decode.pending else demand.idle_s,
            ),
            parked=demand.waiting,
            transferring=demand.transferring,
            arrived=demand.arrived,
        )

    def _pool(self, role: Role, demand: FleetDemand, now: float) -> PoolState:
        asleep = self._asleep(role)
        start_s = demand.start_s.get(role)
        return PoolState(
            ready=self._joined(role),
            asleep=asleep,
            pending=tuple(self._missing(role, now)),
            draining=sum(
                link.role is role and (link.draining or link.slumber.rest is Rest.RETIRING)
                for link in self._registry.links
            ),
            desired=self._desired[role],
            kept=self._kept[role],
            # The next one wakes up, where one sleeps.
            start_s=demand.wake_s.get(role, start_s) if asleep else start_s,
        )

    def _missing(self, role: Role, now: float) -> list[float]:
        missing = max(0, self._desired[role] - self._joined(role))
        since = self._missing_since[role]
        del since[: max(0, len(since) - missing)]
        since += [now] * (missing - len(since))
        return since


def _undecided(memory: Memory, role: Role, before: Memory) -> Memory:
    """What the provider did not take was not decided: the next decision has the same reasons."""
    if role is Role.PREFILL:
        return replace(memory, prefill=before.prefill)
    return replace(memory, decode=before.decode)
