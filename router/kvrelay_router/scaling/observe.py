"""From what workers report to what the scaler is told."""

from collections.abc import Sequence

from kvrelay_router.requests.placement import Role, WorkerState
from kvrelay_router.scaling.state import DecodeLoad, PrefillLoad


def prefill_load(
    workers: Sequence[WorkerState],
    *,
    parked_tokens: int,
    arriving_tokens_per_second: float,
    idle_s: float,
) -> PrefillLoad:
    """Sum the backlogs of all workers, decode workers that compute prompts themselves included.

    Args:
        workers: all that have joined; one that leaves takes its backlog with it.
        parked_tokens: prompt tokens of requests that wait in the router.
        arriving_tokens_per_second: see `DemandMeter`.
        idle_s: since there last was a prompt to compute.
    """
    backlog = sum(w.backlog_tokens + w.pending_tokens for w in workers if w.role is Role.PREFILL)
    local = sum(w.backlog_tokens for w in workers if w.role is Role.DECODE)
    return PrefillLoad(
        uncached_tokens=backlog + local + parked_tokens,
        tokens_per_second=prefill_speed(workers),
        local_tokens_per_second=_mean_speed(workers, Role.DECODE),
        arriving_tokens_per_second=arriving_tokens_per_second,
        idle_s=idle_s,
    )


def prefill_speed(workers: Sequence[WorkerState]) -> float | None:
    """Mean tokens per second of the prefill workers measured, else of the decode workers."""
    return _mean_speed(workers, Role.PREFILL) or _mean_speed(workers, Role.DECODE)


def _mean_speed(workers: Sequence[WorkerState], role: Role) -> float | None:
    speeds = [w.tokens_per_second for w in workers if w.role is role and w.tokens_per_second]
    return sum(speeds) / len(speeds) if speeds else None


def decode_load(workers: Sequence[WorkerState], *, parked_blocks: int, idle_s: float) -> DecodeLoad:
    """Sum over the decode workers that are not draining: theirs is the room for what comes.

    Args:
        workers: all that have joined.
        parked_blocks: of requests that wait in the router (`placement.blocks_needed`).
        idle_s: since the last request was parked, queued, streaming or in transfer.
    """
    ready = [w for w in workers if w.role is Role.DECODE and not w.draining]
    return DecodeLoad(
        used_blocks=sum(w.total_blocks - w.available_blocks for w in ready),
        total_blocks=sum(w.total_blocks for w in ready),
        waiting_blocks=sum(w.pending_blocks for w in ready) + parked_blocks,
        streams=sum(w.running for w in workers if w.role is Role.DECODE),
        waiting=sum(max(w.waiting, w.ungranted) for w in ready),
        idle_s=idle_s,
    )
