"""The scaler's settings."""

from dataclasses import dataclass, field

from kvrelay_router.requests.placement import Role


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """Bounds and damping of one pool.

    Raises:
        ValueError: a bound or a time that can't be met, naming it.
    """

    min: int = 0
    max: int = 1
    idle_s: float = 300.0
    """Idle for this long, a pool whose `min` is 0 goes to zero. What a start costs is what staying
    for as long costs: the break-even of ski rental (Karlin et al. 1988) is the time of a start.
    """
    sleep_s: float = 0.0
    """Its workers' processes are kept asleep for so long before they end; 0: they end at once."""
    stabilisation_s: float = 120.0
    """Fewer replicas must have sufficed for this long before any is let go."""
    cooldown_s: float = 30.0
    """Pause between a change and a scale-down. A scale-up never waits: late costs users."""
    start_s: float = 10.0
    """What a start is expected to take, before one has been measured."""
    start_timeout_s: float = 300.0
    """A replica that has not joined by then is cancelled, and for as long no other is asked for."""

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max:
            raise ValueError(f"min {self.min} must be from 0 to max {self.max}")
        for name in (
            "idle_s",
            "sleep_s",
            "stabilisation_s",
            "cooldown_s",
            "start_s",
            "start_timeout_s",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")


@dataclass(frozen=True, slots=True)
class Budget:
    """What both pools may cost together; None is no limit.

    Raises:
        ValueError: it is less than a replica for an hour.
    """

    replicas: int | None = None
    """At any time, by their targets."""
    replica_seconds_per_hour: float | None = None
    """Within each hour counted from the first decision. It always pays for the pools' minimum and
    one decode worker, so that nothing parked is ever left without one; what is above that may be
    spent at once.
    """

    def __post_init__(self) -> None:
        if self.replicas is not None and self.replicas < 1:
            raise ValueError(f"budget of {self.replicas} replicas must be at least 1")
        if (seconds := self.replica_seconds_per_hour) is not None and not seconds >= 3600:
            raise ValueError(f"budget of {seconds} replica-seconds an hour must be at least 3600")


@dataclass(frozen=True, slots=True)
class ScalerConfig:
    """Targets of both pools. One with `prefill.max` 0 has one aggregated pool.

    Raises:
        ValueError: a target outside its range, or minima above the budget.
    """

    prefill: PoolConfig = field(default_factory=PoolConfig)
    decode: PoolConfig = field(default_factory=PoolConfig)
    target_backlog_s: float = 2.0
    """Prompts may wait this long for their turn: seconds of computation per prefill worker."""
    target_utilisation: float = 0.8
    """Share of its time that a prefill worker computes, on average over the meter's window."""
    target_block_occupancy: float = 0.8
    target_streams: int = 64
    """Live streams of one decode worker; beyond it the time per token exceeds what is promised."""
    split_utilisation: float = 0.5
    """Decode workers alone may spend this share of their time on prompts; beyond it prefill wakes."""
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        for name in ("target_utilisation", "target_block_occupancy", "split_utilisation"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0 and at most 1")
        if not self.target_backlog_s > 0 or self.target_streams < 1:
            raise ValueError("target_backlog_s and target_streams must be positive")
        if self.decode.max < 1:
            raise ValueError("decode.max 0 serves nothing: it must be at least 1")
        least = self.reserved
        limit = self.budget.replicas
        if limit is not None and limit < least:
            raise ValueError(f"a budget of {limit} replicas is below the {least} always needed")
        seconds = self.budget.replica_seconds_per_hour
        if seconds is not None and seconds < 3600 * least:
            raise ValueError(
                f"a budget of {seconds:g} replica-seconds an hour does not pay for the {least} "
                f"replicas always needed: it must be at least {3600 * least}"
            )

    @property
    def reserved(self) -> int:
        """Replicas that no budget may take: the minima, and one decode worker."""
        return self.prefill.min + max(1, self.decode.min)

    def pool(self, role: Role) -> PoolConfig:
        return self.prefill if role is Role.PREFILL else self.decode
