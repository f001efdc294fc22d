"""How many workers each pool should have: pure, without I/O, clock or threads.

`decide` is the policy, `FleetState` what it is told, `Memory` what it remembers, `Decision` what it
answers. `prefill_load`, `decode_load` and `DemandMeter` make the state from what workers report.
"""

from kvrelay_router.scaling.config import Budget, PoolConfig, ScalerConfig
from kvrelay_router.scaling.meter import DemandMeter
from kvrelay_router.scaling.observe import decode_load, prefill_load, prefill_speed
from kvrelay_router.scaling.policy import Reason, decide
from kvrelay_router.scaling.state import (
    Decision,
    DecodeLoad,
    FleetState,
    Memory,
    PoolMemory,
    PoolState,
    PrefillLoad,
    Reasons,
    Targets,
)

__all__ = [
    "Budget",
    "Decision",
    "DecodeLoad",
    "DemandMeter",
    "FleetState",
    "Memory",
    "PoolConfig",
    "PoolMemory",
    "PoolState",
    "PrefillLoad",
    "Reason",
    "Reasons",
    "ScalerConfig",
    "Targets",
    "decide",
    "decode_load",
    "prefill_load",
    "prefill_speed",
]
