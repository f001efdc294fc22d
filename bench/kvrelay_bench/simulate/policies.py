"""Who decides: the product's policy, and what one would have instead of it."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvrelay_router.scaling import FleetState, Memory, ScalerConfig, Targets, decide


@dataclass(slots=True)
class Kvrelay:
    """`kvrelay_router.scaling.decide`, unchanged."""

    config: ScalerConfig
    memory: Memory = field(default_factory=Memory)
    every_s: float | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    """Decisions by pool and reason."""

    @property
    def resting(self) -> bool:
        memory, config = self.memory, self.config
        return (memory.prefill.target, memory.decode.target) == (
            config.prefill.min,
            config.decode.min,
        )

    def targets(self, state: FleetState, now: float) -> Targets:
        decision = decide(state, now, self.config, self.memory)
        self.memory = decision.memory
        for key in (f"prefill {decision.reasons.prefill}", f"decode {decision.reasons.decode}"):
            self.reasons[key] = self.reasons.get(key, 0) + 1
        return decision.targets


@dataclass(frozen=True, slots=True)
class AlwaysOn:
    """As many as the oracle ever needs, all the time."""

    replicas: Targets
    every_s: float | None = math.inf
    resting: bool = False

    def targets(self, state: FleetState, now: float) -> Targets:  # noqa: ARG002 - it looks at nothing
        return self.replicas


_Recent = deque[tuple[float, int]]


def _wants(state: FleetState, config: ScalerConfig, backlog_s: float) -> tuple[float, float]:
    """Workers' worth of load in each pool: prompts over `backlog_s`, blocks over their target.

    Prompts count in seconds of computation: they differ in length by a factor of a thousand.
    """
    prompts, blocks = state.prefill_load, state.decode_load
    speed = prompts.tokens_per_second
    waiting = (prompts.uncached_tokens or 0) / speed / backlog_s if speed else 0.0
    each = (blocks.total_blocks or 0) / max(1, state.decode.ready) * config.target_block_occupancy
    held = ((blocks.used_blocks or 0) + (blocks.waiting_blocks or 0)) / each if each else 0.0
    return (0.0, max(waiting, held)) if config.prefill.max == 0 else (waiting, held)


def _bounded(prefill: int, decode: int, config: ScalerConfig) -> Targets:
    return Targets(min(config.prefill.max, prefill), min(config.decode.max, decode))


@dataclass(slots=True)
class QueueHpa:
    """Kubernetes' HorizontalPodAutoscaler, at its defaults, on the queue and on KV occupancy.

    desired = ceil(current * metric / target) with a tolerance of 10 %, every 15 s; the highest of the
    last 300 s counts when scaling down; at most doubled or plus four in a sync; never zero. Five
    seconds of prompts may wait per replica; the decode pool has the occupancy that our policy has.
    """

    config: ScalerConfig
    backlog_s: float = 5.0
    every_s: float | None = 15.0
    resting: bool = False
    _recent: tuple[_Recent, _Recent] = field(default_factory=lambda: (deque(), deque()))

    def targets(self, state: FleetState, now: float) -> Targets:
        prompts, blocks = _wants(state, self.config, self.backlog_s)
        return _bounded(
            self._desired(prompts, state.prefill.ready, self._recent[0], now),
            self._desired(blocks, state.decode.ready, self._recent[1], now),
            self.config,
        )

    def _desired(self, worth: float, ready: int, recent: _Recent, now: float) -> int:
        wanted = ready if abs(worth / max(1, ready) - 1) <= 0.1 else math.ceil(worth)
        recent.append((now, max(1, min(wanted, max(2 * ready, ready + 4)))))
        while recent[0][0] < now - 300:
            recent.popleft()
        return max(value for _, value in recent)


@dataclass(slots=True)
class KeepAlive:
    """A replica whenever those there are full, and each stays for ten minutes after it was needed.

    What function platforms do. Both pools wake at the first request.
    """

    config: ScalerConfig
    backlog_s: float = 5.0
    keep_s: float = 600.0
    every_s: float | None = None
    resting: bool = False
    _needed: tuple[_Recent, _Recent] = field(default_factory=lambda: (deque(), deque()))

    def targets(self, state: FleetState, now: float) -> Targets:
        load = state.decode_load
        here = int(bool(state.parked or state.arrived or load.streams or load.waiting))
        prompts, blocks = _wants(state, self.config, self.backlog_s)
        return _bounded(
            self._keep(self._needed[0], now, max(here, math.ceil(prompts))),
            self._keep(self._needed[1], now, max(here, math.ceil(blocks))),
            self.config,
        )

    def _keep(self, recent: _Recent, now: float, wanted: int) -> int:
        """The most that was wanted within `keep_s`: a falling line, so only its corners are kept."""
        while recent and recent[-1][1] <= wanted:
            recent.pop()
        recent.append((now, wanted))
        while recent[0][0] < now - self.keep_s:
            recent.popleft()
        return recent[0][1]


@dataclass(slots=True)
class Planned:
    """Carries out the oracle's plan: each worker is asked for a start ahead of its need.

    It shows how far below reality the oracle is: without any headroom, prompts that can't be divided
    fall behind the fluid, and the plan has nothing left to catch up with.
    """

    plan: Sequence[Targets]
    """One for each bin."""
    bin_s: float
    lead_s: tuple[float, float]
    """How long a start of each pool takes."""
    every_s: float | None = None
    resting: bool = False

    def targets(self, state: FleetState, now: float) -> Targets:
        first = int(now / self.bin_s)
        prefill = self._over(first, now + self.lead_s[0])
        decode = self._over(first, now + self.lead_s[1])
        load = state.decode_load
        late = bool(state.parked or load.streams or load.waiting)
        return Targets(max(t.prefill for t in prefill), max(int(late), *(t.decode for t in decode)))

    def _over(self, first: int, until: float) -> Sequence[Targets]:
        last = min(int(until / self.bin_s), len(self.plan) - 1)
        return self.plan[min(first, last) : last + 1]
