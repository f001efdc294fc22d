"""How many replicas each pool should have: one pure function of what is known.

`kvrelay up`, the KEDA endpoint and the simulator call the same `decide`, periodically and whenever a
request is parked. The formulae are in docs/scaling.md, their reasons in ADR 18.
"""

import math
from dataclasses import replace
from enum import StrEnum
from typing import NamedTuple

from kvrelay_router.requests.placement import Role
from kvrelay_router.scaling.config import PoolConfig, ScalerConfig
from kvrelay_router.scaling.shape import Sizes, reshape
from kvrelay_router.scaling.sleep import kept_asleep
from kvrelay_router.scaling.state import (
    Decision,
    FleetState,
    Memory,
    PoolMemory,
    PoolState,
    Reasons,
    ShapeMemory,
    Targets,
)

_HOUR = 3600.0
_SLOWEST = 0.1
"""Tokens per second: what measures less has measured something else, and would call for a fleet without end."""
_SPEED_S = 60.0
"""The speed last measured depends on the prompts it was measured with."""
_SURPLUS_S = 60.0
"""Replicas above the reserved ones must be affordable for this long."""


class Reason(StrEnum):
    """Why a pool's target is what it is."""

    STEADY = "steady"
    WAKE = "wake"
    """From zero, since a request came."""
    BACKLOG = "backlog"
    RATE = "rate"
    """Prompt tokens per second that arrive."""
    OCCUPANCY = "occupancy"
    STREAMS = "streams"
    MINIMUM = "minimum"
    STABILISING = "stabilising"
    """Fewer would do, but not for long enough yet."""
    COOLDOWN = "cooldown"
    NOT_IDLE = "not_idle"
    """Nothing to do, but not for long enough to go to zero."""
    IDLE = "idle"
    SURPLUS = "surplus"
    """Fewer have sufficed for the stabilisation time."""
    MERGED = "merged"
    """Decode workers do the pool's work as well, with fewer replicas in all."""
    MISSING = "missing_metric"
    BLOCKED = "start_timeout"
    """Replicas asked for never came: no more for now."""
    SECOND_WRITER = "second_writer"
    """The provider had another number than ours: ours stands."""
    LIMIT = "limit"
    """The pool's `max`."""
    BUDGET = "budget"


class _Need(NamedTuple):
    """Replicas that the load calls for; None where a metric is missing."""

    replicas: int | None
    why: Reason
    demanded: bool
    """Somebody is there who must not be left without a worker."""
    dispensable: bool
    """The fleet could do without the pool, once it has been idle for long enough."""
    idle_s: float | None


class _Moment(NamedTuple):
    """When one pool is decided on, and by what settings."""

    now: float
    config: PoolConfig
    watched_s: float
    """Since this scaler started."""


def decide(state: FleetState, now: float, config: ScalerConfig, memory: Memory) -> Decision:
    """Targets for both pools.

    Args:
        state: what is known of the fleet.
        now: seconds, on the clock of every time in `state` and `memory`.
        config: bounds and targets.
        memory: that of the last decision; `Memory()` after a restart.

    Returns:
        Targets within min and max of each pool and within the budget, with a reason each, and the
        memory for the next call. The same arguments give the same decision.
    """
    memory = _remember(memory, state, now, config)
    shape = _shape(state, now, config, memory)
    if shape != memory.shape:
        memory = replace(memory, shape=shape)
    watched_s = now - (now if memory.started_at is None else memory.started_at)
    decode_need = _decode_need(state, config, memory)
    decode, decode_why, decode_memory = _pool(
        state.decode,
        decode_need,
        _Moment(now, config.decode, watched_s),
        memory.decode,
    )
    prefill, prefill_why, prefill_memory = _pool(
        state.prefill,
        _prefill_need(state, config, memory, decode_need),
        _Moment(now, config.prefill, watched_s),
        memory.prefill,
    )
    afforded = _afford(Targets(prefill, decode), now, config, memory)
    if afforded.prefill < prefill:
        prefill_why = Reason.BUDGET
    if afforded.decode < decode:
        decode_why = Reason.BUDGET
    prefill_asleep, prefill_memory = kept_asleep(
        state.prefill, afforded.prefill, now, config.prefill, prefill_memory
    )
    decode_asleep, decode_memory = kept_asleep(
        state.decode, afforded.decode, now, config.decode, decode_memory
    )
    if memory.shape.apart and not afforded.prefill:
        memory = replace(memory, shape=replace(memory.shape, apart=False))
    return Decision(
        Targets(afforded.prefill, afforded.decode, prefill_asleep, decode_asleep),
        _recall(
            memory,
            _aim(prefill_memory, afforded.prefill),
            _aim(decode_memory, afforded.decode),
        ),
        Reasons(str(prefill_why), str(decode_why)),
    )


def _recall(memory: Memory, prefill: PoolMemory, decode: PoolMemory) -> Memory:
    if memory.prefill is prefill and memory.decode is decode:
        return memory
    return replace(memory, prefill=prefill, decode=decode)


def _aim(mine: PoolMemory, target: int) -> PoolMemory:
    return mine if mine.target == target else replace(mine, target=target)


# ---- what the load calls for


def _demanded(state: FleetState) -> bool:
    """Whether anybody waits for anything: demand for prompts is demand for decoding to come."""
    load = state.decode_load
    return any(
        (
            state.parked,
            state.arrived,
            state.transferring,
            state.prefill_load.uncached_tokens,
            load.streams,
            load.waiting,
        )
    )


def _decode_need(state: FleetState, config: ScalerConfig, memory: Memory) -> _Need:
    load = state.decode_load
    demanded = _demanded(state)
    unknown = _Need(None, Reason.MISSING, demanded, dispensable=False, idle_s=None)
    if (
        load.used_blocks is None
        or load.total_blocks is None
        or load.waiting_blocks is None
        or load.streams is None
        or load.waiting is None
        or state.parked is None
        or state.transferring is None
    ):
        return unknown
    wants = [(int(demanded), Reason.WAKE if state.decode.desired == 0 else Reason.STEADY)]
    if state.decode.ready:  # before that, one serves whoever is parked and shows what it can do
        if demanded and memory.decode_wanted is not None:
            wants.append((math.ceil(memory.decode_wanted), Reason(memory.decode_why)))
        if not memory.shape.apart:
            prompts = _prompt_workers(state, Role.DECODE, config, memory)
            if prompts is not None:
                # The average outlasts the last request: with nobody there it is no reason to grow.
                wanted = prompts[0] if demanded else min(prompts[0], state.decode.desired)
                wants.append((wanted, prompts[1]))
            elif config.prefill.max == 0 or _speed(memory, Role.DECODE):
                return unknown
    replicas, why = max(wants, key=lambda want: want[0])
    return _Need(replicas, why, demanded, dispensable=not demanded, idle_s=load.idle_s)


def _decode_wanted(state: FleetState, config: ScalerConfig) -> tuple[float, Reason] | None:
    """Decode workers' worth of what is there: summed blocks, or streams; None if it can't be told."""
    load, ready = state.decode_load, state.decode.ready
    if (
        not ready
        or not load.total_blocks
        or load.used_blocks is None
        or load.waiting_blocks is None
        or load.streams is None
        or load.waiting is None
        or state.parked is None
    ):
        return None
    each = load.total_blocks / ready * config.target_block_occupancy
    blocks = (load.used_blocks + load.waiting_blocks) / each
    streams = (load.streams + load.waiting + state.parked) / config.target_streams
    return (blocks, Reason.OCCUPANCY) if blocks >= streams else (streams, Reason.STREAMS)


def _prefill_need(state: FleetState, config: ScalerConfig, memory: Memory, decode: _Need) -> _Need:
    load = state.prefill_load
    present = state.prefill.desired > 0
    demanded = present and bool(load.uncached_tokens)
    prompts = _prompt_workers(state, Role.PREFILL, config, memory)
    if prompts is None:
        return _Need(None, Reason.MISSING, demanded, dispensable=False, idle_s=None)
    replicas, why = prompts
    if memory.shape.apart:
        dispensable = not demanded and _kept(state, config, memory)
        replicas = replicas if present else max(1, replicas)
        return _Need(replicas, why, demanded, dispensable=dispensable, idle_s=load.idle_s)
    if present and (decode.replicas is None or state.decode.ready < decode.replicas):
        # It stays until the decode workers are there that are to do its work.
        return _Need(max(1, replicas), why, demanded, dispensable=False, idle_s=load.idle_s)
    why = Reason.MERGED if present else Reason.STEADY
    return _Need(0, why, demanded=False, dispensable=True, idle_s=math.inf)


def _shape(state: FleetState, now: float, config: ScalerConfig, memory: Memory) -> ShapeMemory:
    """One pool or two from now on."""
    mine, prefill = memory.shape, config.prefill
    if prefill.max == 0 or prefill.min > 0:
        return ShapeMemory(apart=prefill.max > 0)
    if mine.apart is None:
        mine = ShapeMemory(apart=state.prefill.desired > 0)
    own = _prompt_workers(state, Role.PREFILL, config, memory)
    local = _prompt_workers(state, Role.DECODE, config, memory)
    if own is None or local is None:
        return mine
    if not state.decode.ready:  # one is on its way: there is nothing to compare with yet
        return mine if mine.apart or _kept(state, config, memory) else ShapeMemory(apart=True)
    streams = max(int(_demanded(state)), math.ceil(memory.decode_wanted or 0.0))
    sizes = Sizes(max(streams, local[0]), config.decode.max, streams, own[0])
    return reshape(mine, sizes, now, stabilisation_s=prefill.stabilisation_s)


def _kept(state: FleetState, config: ScalerConfig, memory: Memory) -> bool:
    """Whether so few prompts are there that the decode workers there are may keep them."""
    load, speed = state.prefill_load, _speed(memory, Role.PREFILL)
    if load.uncached_tokens is None or load.arriving_tokens_per_second is None or not speed:
        return False
    local = max(1, state.decode.ready)
    share = load.arriving_tokens_per_second / speed / local
    start_s = _start_s(state, Role.PREFILL, config)
    left = load.uncached_tokens / speed / local - (1.0 - share) * start_s
    return share <= config.split_utilisation and left <= config.target_backlog_s


def _prompt_workers(
    state: FleetState, role: Role, config: ScalerConfig, memory: Memory
) -> tuple[int, Reason] | None:
    """Workers by arrivals and by backlog, in worker-seconds; None where they can't be told.

    ```
    by rate:    arriving / utilisation
    by backlog: the least n with  backlog - (n - arriving) * start <= n * patience
                that is           (backlog + arriving * start) / (patience + start)
    patience:   target_backlog_s, but no less than a start takes
    ```
    What will have been finished when a worker asked for now is ready is no reason to ask for it, and one
    that works for a shorter time than it takes to start would cost more than it brings. Neither term
    looks at how many workers there are: those on their way need no discount, and a constant load always
    calls for the same number. Decode workers that could have help may spend less of their time so.
    """
    load, speed = state.prefill_load, _speed(memory, role)
    if load.uncached_tokens is None or load.arriving_tokens_per_second is None or not speed:
        return None
    arriving = load.arriving_tokens_per_second / speed
    helped = role is Role.DECODE and config.prefill.max > 0
    utilisation = config.split_utilisation if helped else config.target_utilisation
    by_rate = math.ceil(arriving / utilisation)
    start_s = _start_s(state, role, config)
    patience = max(config.target_backlog_s, start_s)
    backlog_s = load.uncached_tokens / speed
    by_backlog = math.ceil((backlog_s + arriving * start_s) / (patience + start_s))
    if by_rate >= by_backlog:
        return by_rate, Reason.RATE
    return by_backlog, Reason.BACKLOG


def _start_s(state: FleetState, role: Role, config: ScalerConfig) -> float:
    """What a start of the pool takes: as measured, else as expected."""
    measured = state.pool(role).start_s
    return config.pool(role).start_s if measured is None else measured


def _speed(memory: Memory, role: Role) -> float | None:
    """Prompt tokens per second of a worker: streams beside it slow a decode worker down."""
    own, local = memory.tokens_per_second, memory.local_tokens_per_second
    speed = (own or local) if role is Role.PREFILL else (local or own)
    return max(speed, _SLOWEST) if speed else None


# ---- damping


def _pool(
    pool: PoolState,
    need: _Need,
    at: _Moment,
    mine: PoolMemory,
) -> tuple[int, Reason, PoolMemory]:
    """The target of one pool before the budget, its reason, and its memory."""
    config = at.config
    foreign = mine.target is not None and mine.target != pool.desired
    current = mine.target if mine.target is not None else pool.desired
    floor = min(config.max, max(config.min, int(need.demanded and current > 0)))
    current, mine = _give_up(pool, current, floor, at, mine)
    target, why, mine = _damped(current, need, at, mine)
    clamped = min(config.max, max(config.min, target))
    if clamped != target:
        why = Reason.LIMIT if clamped < target else Reason.MINIMUM
    if clamped != current:
        mine = replace(mine, changed_at=at.now, low_since=None, low_peak=0)
    elif foreign:
        why = Reason.SECOND_WRITER
    return clamped, why, mine


def _give_up(
    pool: PoolState, current: int, floor: int, at: _Moment, mine: PoolMemory
) -> tuple[int, PoolMemory]:
    """Cancel what was asked for too long ago, but never the only replica somebody waits for."""
    expired = sum(at.now - since > at.config.start_timeout_s for since in pool.pending)
    cancelled = min(expired, max(0, current - max(floor, pool.ready)))
    if not cancelled:
        return current, mine
    return current - cancelled, replace(mine, blocked_until=at.now + at.config.start_timeout_s)


def _damped(
    current: int, need: _Need, at: _Moment, mine: PoolMemory
) -> tuple[int, Reason, PoolMemory]:
    if need.demanded and current == 0 and need.replicas is None:
        return 1, Reason.WAKE, mine
    if need.replicas is None:
        return current, Reason.MISSING, _no_surplus(mine)
    if need.replicas > current:
        if mine.blocked_until is not None and at.now < mine.blocked_until and current > 0:
            return current, Reason.BLOCKED, mine
        return need.replicas, need.why, _no_surplus(mine)
    if need.replicas == current and not (current and need.dispensable):
        return current, Reason.STEADY, _no_surplus(mine)
    return _shrink(current, need, need.replicas, at, mine)


def _no_surplus(mine: PoolMemory) -> PoolMemory:
    return mine if mine.low_since is None else replace(mine, low_since=None, low_peak=0)


def _shrink(
    current: int, need: _Need, replicas: int, at: _Moment, mine: PoolMemory
) -> tuple[int, Reason, PoolMemory]:
    """Fewer would do: only when it has lasted, and to zero only when nobody came at all."""
    since = at.now if mine.low_since is None else mine.low_since
    peak = replicas if mine.low_since is None else max(mine.low_peak, replicas)
    if (since, peak) != (mine.low_since, mine.low_peak):
        mine = replace(mine, low_since=since, low_peak=peak)
    if mine.changed_at is not None and at.now - mine.changed_at < at.config.cooldown_s:
        return current, Reason.COOLDOWN, mine
    if need.dispensable and _idle(need, at):
        return 0, Reason.MERGED if need.why is Reason.MERGED else Reason.IDLE, mine
    keep = max(peak, 1)
    if keep >= current:
        return current, Reason.NOT_IDLE if need.dispensable else Reason.STABILISING, mine
    if at.now - since < at.config.stabilisation_s:
        return current, Reason.STABILISING, mine
    return keep, Reason.SURPLUS, mine


def _idle(need: _Need, at: _Moment) -> bool:
    """Nobody came for `idle_s`, and this scaler has watched for as long itself."""
    return need.idle_s is not None and min(need.idle_s, at.watched_s) >= at.config.idle_s


# ---- what is averaged


def _remember(memory: Memory, state: FleetState, now: float, config: ScalerConfig) -> Memory:
    """What this state adds to the averages and to the account."""
    passed = 0.0 if memory.decided_at is None else max(0.0, now - memory.decided_at)
    began, spent = _account(memory, state, now)
    load, speed, local = (
        state.prefill_load,
        memory.tokens_per_second,
        memory.local_tokens_per_second,
    )
    if load.tokens_per_second and load.tokens_per_second != load.local_tokens_per_second:
        speed = _average(speed, load.tokens_per_second, passed, _SPEED_S)
    if load.local_tokens_per_second:
        local = _average(local, load.local_tokens_per_second, passed, _SPEED_S)
    # Without a worker there is nothing to average; an unknown metric leaves what was known.
    average, why = memory.decode_wanted if state.decode.ready else None, memory.decode_why
    if wanted := _decode_wanted(state, config):
        # A replica helps only against what outlasts its start.
        average = _average(average, wanted[0], passed, _start_s(state, Role.DECODE, config))
        why = str(wanted[1])
    return replace(
        memory,
        started_at=now if memory.started_at is None else memory.started_at,
        tokens_per_second=speed,
        local_tokens_per_second=local,
        decode_wanted=average,
        decode_why=why,
        decided_at=now,
        hour_began=began,
        hour_spent=spent,
    )


def _average(before: float | None, value: float, passed_s: float, over_s: float) -> float:
    """Exponential moving average of irregular samples."""
    if before is None or over_s <= 0:
        return value
    return value + (before - value) * math.exp(-passed_s / over_s)


# ---- budget


def _account(memory: Memory, state: FleetState, now: float) -> tuple[float, float]:
    """When this hour began, and what the fleet has cost in it."""
    began = now if memory.hour_began is None else memory.hour_began
    spent, last = memory.hour_spent, now if memory.decided_at is None else memory.decided_at
    running = sum(p.ready + len(p.pending) + p.draining for p in (state.prefill, state.decode))
    if now - began >= _HOUR:
        began += _HOUR * ((now - began) // _HOUR)
        spent, last = 0.0, max(last, began)
    return began, spent + running * max(0.0, now - last)


def _afford(targets: Targets, now: float, config: ScalerConfig, memory: Memory) -> Targets:
    """Cut prefill first: decode workers serve alone. The reserved replicas are never cut."""
    limit = _affordable(now, config, memory)
    excess = max(0, targets.prefill + targets.decode - limit)
    least_decode = min(targets.decode, max(1, config.decode.min))
    prefill = targets.prefill - min(excess, targets.prefill - config.prefill.min)
    excess -= targets.prefill - prefill
    return Targets(prefill, targets.decode - min(excess, targets.decode - least_decode))


def _affordable(now: float, config: ScalerConfig, memory: Memory) -> int:
    """Replicas that the budget pays for now, both pools together."""
    limits = [config.prefill.max + config.decode.max]
    if config.budget.replicas is not None:
        limits.append(config.budget.replicas)
    seconds = config.budget.replica_seconds_per_hour
    if seconds is not None and memory.hour_began is not None:
        left = memory.hour_began + _HOUR - now
        surplus = seconds - memory.hour_spent - config.reserved * left
        extra = max(0, math.floor(surplus / min(_SURPLUS_S, max(left, 1.0))))
        limits.append(config.reserved + extra)
    return min(limits)
