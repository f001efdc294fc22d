"""What the scaler is told and what it remembers: frozen values, no clock and no I/O.

All times are seconds on one monotonic clock, the caller's. A metric that is missing is None, never
zero: a pool of which something is unknown keeps its size (`policy.decide`).
"""

from dataclasses import dataclass, field

from kvrelay_router.requests.placement import Role


@dataclass(frozen=True, slots=True)
class PoolState:
    """Replicas of one pool, as the provider and the joined workers have them."""

    ready: int = 0
    """Joined, awake, and not draining."""
    asleep: int = 0
    """Joined and not awake: asleep, or on the way there or back."""
    pending: tuple[float, ...] = ()
    """When each replica that has not joined or woken up yet was asked for, oldest first."""
    draining: int = 0
    """On their way out, or finishing what they have before they sleep: they cost, but take nothing new, and are
    not part of `desired`.
    """
    desired: int = 0
    """What the provider was last told, by whomever, less those kept asleep: after a restart it is read there."""
    kept: int = 0
    """Processes that it was told to run besides, for workers that sleep."""
    start_s: float | None = None
    """How long a replica lately took from asked for to joined; None before the first."""


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """Demand for prompt computation, wherever it is computed."""

    uncached_tokens: int | None = None
    """Prompt tokens still to compute: waiting, in progress, and those of parked requests."""
    tokens_per_second: float | None = None
    """Of one worker, measured around the computation itself; None before the first prompt. Of a decode
    worker, where no prefill worker has been measured.
    """
    local_tokens_per_second: float | None = None
    """Of one decode worker that computed prompts between the steps of its streams."""
    arriving_tokens_per_second: float | None = None
    """Uncached prompt tokens asked for, averaged over minutes (`meter.DemandMeter`)."""
    idle_s: float | None = None
    """Since the pool last had a prompt to compute; 0 while it has."""


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """Demand for decoding. Blocks are summed over the workers that are ready, never averaged."""

    used_blocks: int | None = None
    """Held by sequences; what is merely cached is free."""
    total_blocks: int | None = None
    waiting_blocks: int | None = None
    """What requests that hold no blocks yet will need: waiting on a worker, queued or parked."""
    streams: int | None = None
    """Sequences that hold blocks."""
    waiting: int | None = None
    """Sequences sent to a worker that hold none yet."""
    idle_s: float | None = None
    """Since the last request was parked, queued, streaming or in transfer; 0 while one is."""


@dataclass(frozen=True, slots=True)
class FleetState:
    """Everything `decide` looks at."""

    prefill: PoolState = field(default_factory=PoolState)
    decode: PoolState = field(default_factory=PoolState)
    prefill_load: PrefillLoad = field(default_factory=PrefillLoad)
    decode_load: DecodeLoad = field(default_factory=DecodeLoad)
    parked: int | None = None
    """Requests that wait in the router, for a worker to start or for room on one."""
    transferring: int | None = None
    """Sequences whose KV is on its way to a decode worker, or waits for it on a prefill worker."""
    arrived: int = 0
    """Requests that came since the last decision, even those that ended before this one."""

    def pool(self, role: Role) -> PoolState:
        return self.prefill if role is Role.PREFILL else self.decode


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """What one pool's damping needs from one decision to the next."""

    target: int | None = None
    """Decided last. A provider that says otherwise was written to by somebody else."""
    changed_at: float | None = None
    low_since: float | None = None
    """Since when fewer replicas than there are would do, without a break."""
    low_peak: int = 0
    """The most that was needed since then."""
    blocked_until: float | None = None
    """Starts timed out: until then no more are asked for."""
    asleep_since: float | None = None
    """Since when workers are kept asleep and none was needed."""


@dataclass(frozen=True, slots=True)
class ShapeMemory:
    """Whether prompts have workers of their own."""

    apart: bool | None = None
    """None: not decided yet, as after a restart."""
    other_since: float | None = None
    """Since when the other shape would take fewer replicas, without a break."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Goes into `decide` and comes out of it. The default is that of a scaler just started."""

    prefill: PoolMemory = field(default_factory=PoolMemory)
    decode: PoolMemory = field(default_factory=PoolMemory)
    started_at: float | None = None
    tokens_per_second: float | None = None
    """Prefill speed of late, averaged; a pool at zero has nobody to measure."""
    local_tokens_per_second: float | None = None
    """The same of decode workers."""
    shape: ShapeMemory = field(default_factory=ShapeMemory)
    decode_wanted: float | None = None
    """Decode workers' worth of streams, averaged over the time of a start."""
    decode_why: str = ""
    """Whether blocks or the number of streams call for most of it."""
    decided_at: float | None = None
    hour_began: float | None = None
    hour_spent: float = 0.0
    """Replica-seconds since `hour_began`."""

    def pool(self, role: Role) -> PoolMemory:
        return self.prefill if role is Role.PREFILL else self.decode


@dataclass(frozen=True, slots=True)
class Targets:
    """Replicas wanted of each pool, and besides them processes kept asleep."""

    prefill: int
    decode: int
    prefill_asleep: int = 0
    decode_asleep: int = 0

    def of(self, role: Role) -> int:
        return self.prefill if role is Role.PREFILL else self.decode

    def asleep(self, role: Role) -> int:
        return self.prefill_asleep if role is Role.PREFILL else self.decode_asleep


@dataclass(frozen=True, slots=True)
class Reasons:
    """Why each target is what it is: one word of `policy.Reason` per pool."""

    prefill: str
    decode: str

    def of(self, role: Role) -> str:
        return self.prefill if role is Role.PREFILL else self.decode


@dataclass(frozen=True, slots=True)
class Decision:
    """What to tell the provider, what to remember, and why."""

    targets: Targets
    memory: Memory
    reasons: Reasons
