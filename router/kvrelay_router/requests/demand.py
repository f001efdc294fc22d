"""What the requests in hand ask of the fleet: the service's half of what the scaler is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvrelay_router.requests.placement import Role


@dataclass(frozen=True, slots=True)
class FleetDemand:
    """As of one moment. Times in seconds."""

    waiting: int = 0
    """Requests without a place: parked, queued, or between two attempts."""
    waiting_tokens: int = 0
    """Their prompts."""
    waiting_blocks: int = 0
    """KV blocks they will need."""
    transferring: int = 0
    """Sequences whose KV a decode worker waits for."""
    arrived: int = 0
    """Requests since the last time that was asked."""
    arriving_tokens_per_second: float = 0.0
    """Uncached prompt tokens, see `scaling.meter`."""
    idle_s: float = 0.0
    """Since the last request ended; 0 while there is one."""
    prompts_idle_s: float = 0.0
    """Since the last request that had no token yet; 0 while there is one."""
    start_s: Mapping[Role, float] = field(default_factory=dict)
    """How long a pool's last start took."""
    wake_s: Mapping[Role, float] = field(default_factory=dict)
    """How long its last waking took, of a worker that slept."""
