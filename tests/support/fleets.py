"""States of fleets for the tests: one that wants nothing, to be changed by `replace`."""

from dataclasses import replace
from typing import Any

from kvrelay_router.scaling import (
    Decision,
    DecodeLoad,
    FleetState,
    Memory,
    PoolConfig,
    PoolState,
    PrefillLoad,
    ScalerConfig,
    decide,
)

POOL = PoolConfig(
    min=0, max=20, idle_s=60, stabilisation_s=30, cooldown_s=10, start_s=10, start_timeout_s=120
)
CONFIG = ScalerConfig(prefill=POOL, decode=POOL)
BLOCKS = 1000
"""Of one decode worker."""


def pool(ready: int, **more: Any) -> PoolState:
    pending = more.get("pending", ())
    return PoolState(**{"ready": ready, "desired": ready + len(pending), "start_s": 10.0, **more})


def prefill_load(**more: Any) -> PrefillLoad:
    known = {
        "uncached_tokens": 0,
        "tokens_per_second": 1000.0,
        "arriving_tokens_per_second": 0.0,
        "idle_s": 0.0,
    }
    return PrefillLoad(**{**known, **more})


def decode_load(workers: int, **more: Any) -> DecodeLoad:
    known = {
        "used_blocks": 0,
        "total_blocks": workers * BLOCKS,
        "waiting_blocks": 0,
        "streams": 0,
        "waiting": 0,
        "idle_s": 0.0,
    }
    return DecodeLoad(**{**known, **more})


def fleet(prefill: int = 0, decode: int = 0, **more: Any) -> FleetState:
    known = {
        "prefill": pool(prefill),
        "decode": pool(decode),
        "prefill_load": prefill_load(),
        "decode_load": decode_load(decode),
        "parked": 0,
        "transferring": 0,
    }
    return FleetState(**{**known, **more})


def obeyed(state: FleetState, decision: Decision) -> FleetState:
    """The same state with a provider that did at once as it was told."""
    return replace(
        state,
        prefill=replace(state.prefill, ready=decision.targets.prefill, pending=(),
                        desired=decision.targets.prefill),
        decode=replace(state.decode, ready=decision.targets.decode, pending=(),
                       desired=decision.targets.decode),
    )  # fmt: skip


def after(state: FleetState, seconds: float, config: ScalerConfig = CONFIG) -> Decision:
    """The decision that is reached when `state` lasts that long, one decision a second."""
    memory, decision = Memory(), None
    for now in range(int(seconds) + 1):
        decision = decide(state, float(now), config, memory)
        memory = decision.memory
        state = obeyed(state, decision)
    assert decision is not None
    return decision
