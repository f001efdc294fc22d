"""Which workers run an attempt: one pure function of what the workers reported.

A decode worker can take a sequence while its blocks suffice, and a few more that it holds back until
others end; beyond that the request waits in the router, where it can still go to whichever worker has
room first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvrelay_router.config import RouterConfig
from kvrelay_router.requests.types import Path, PathKind

MAX_WAITING = 8
"""Sequences that may wait for room on one decode worker, so that it always has a next one at hand."""


class Role(StrEnum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One worker's last report, and what the router has sent it that the report can't know of."""

    name: str
    role: Role
    block_size: int
    total_blocks: int
    available_blocks: int
    """Free plus cached."""
    running: int = 0
    waiting: int = 0
    backlog_tokens: int = 0
    tokens_per_second: float = 0.0
    """Measured prefill speed; 0 before the first prompt."""
    pending_blocks: int = 0
    pending_tokens: int = 0
    ungranted: int = 0
    """Sequences sent there that hold no blocks yet."""
    draining: bool = False
    quiet: bool = False
    """It has missed heartbeats: it may be gone."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one attempt needs."""

    tokens: int
    """Prompt, plus what was emitted before a replay."""
    replay: bool = False
    local_only: bool = False
    avoid: frozenset[str] = frozenset()
    """Workers to prefer others over."""
    force_path: PathKind | None = None


def place(demand: Demand, workers: Sequence[WorkerState], config: RouterConfig) -> Path | None:
    """The path of one attempt by worker names, or None while no decode worker can take it."""
    candidates = [
        w for w in workers if w.role is Role.DECODE and not w.draining and _accepts(w, demand)
    ]
    if not candidates:
        return None
    decode = min(candidates, key=lambda w: _decode_load(w, demand))
    prefill = _least_loaded_prefill(demand, workers)
    if demand.force_path is PathKind.LOCAL:
        return Path(PathKind.LOCAL, "forced", None, decode.name)
    if demand.force_path is PathKind.DISAGGREGATED:
        if prefill is None:
            return None
        return Path(PathKind.DISAGGREGATED, "forced", prefill.name, decode.name)
    if demand.local_only:
        return Path(PathKind.LOCAL, "replay", None, decode.name)
    if prefill is None:
        reason = "replay" if demand.replay else "no_prefill_worker"
        return Path(PathKind.LOCAL, reason, None, decode.name)
    if prefill.quiet:
        reason = "replay" if demand.replay else "prefill_quiet"
        return Path(PathKind.LOCAL, reason, None, decode.name)
    if demand.tokens <= config.local_prefill_max_tokens:
        reason = "replay" if demand.replay else "short_prompt"
        return Path(PathKind.LOCAL, reason, None, decode.name)
    reason = "replay" if demand.replay else "least_loaded"
    return Path(PathKind.DISAGGREGATED, reason, prefill.name, decode.name)


def blocks_needed(tokens: int, block_size: int) -> int:
    """Blocks of a sequence with one token to come."""
    return -(-(tokens + 1) // block_size)


def _room(worker: WorkerState) -> int:
    return worker.available_blocks - worker.pending_blocks


def _fits(worker: WorkerState, demand: Demand) -> bool:
    return _room(worker) >= blocks_needed(demand.tokens, worker.block_size)


def _waiting(worker: WorkerState) -> int:
    # What is not granted yet is mostly what the worker reports as waiting: the larger, not the sum.
    return max(worker.waiting, worker.ungranted)


def _accepts(worker: WorkerState, demand: Demand) -> bool:
    if demand.replay:
        return True  # a stream that has begun must not fail for a full line
    if worker.waiting < MAX_WAITING and _fits(worker, demand):
        return True
    return _waiting(worker) < MAX_WAITING


def _decode_load(
    worker: WorkerState, demand: Demand
) -> tuple[bool, bool, bool, int, float, int, str]:
    fits = _fits(worker, demand)
    used = 1.0 - _room(worker) / max(1, worker.total_blocks)
    # Where it fits at once, what is merely on its way there does not have to wait.
    waiting = worker.waiting if fits else _waiting(worker)
    avoided = worker.name in demand.avoid
    return (worker.quiet, avoided, not fits, waiting, used, worker.running, worker.name)


def _least_loaded_prefill(demand: Demand, workers: Sequence[WorkerState]) -> WorkerState | None:
    candidates = [w for w in workers if w.role is Role.PREFILL and not w.draining]
    if not candidates:
        return None
    # A worker without a measurement counts as fast as the fastest: that gets it measured.
    fastest = max(w.tokens_per_second for w in candidates) or 1.0

    def wait(worker: WorkerState) -> tuple[bool, bool, float, int, str]:
        backlog = worker.backlog_tokens + worker.pending_tokens + demand.tokens
        seconds = backlog / (worker.tokens_per_second or fastest)
        return (worker.quiet, worker.name in demand.avoid, seconds, worker.running, worker.name)

    return min(candidates, key=wait)
