"""Sums over all workers of a fleet, kept up to date by those that changed.

They are what `kvrelay_router.scaling.prefill_load` and `decode_load` compute from every worker's state,
which for thousands of workers each second would be most of a simulation.
"""

from typing import NamedTuple, Protocol

from kvrelay_router.requests.placement import Role, WorkerState
from kvrelay_router.scaling import DecodeLoad, PrefillLoad

_SPEED_UNIT = 2.0**-20
"""Tokens per second: in whole units, sums have no rounding errors to gather over days."""


class Worker(Protocol):
    """Reports its state, the same object until it changes."""

    def state(self) -> WorkerState: ...


class _Share(NamedTuple):
    """What one worker adds to each sum."""

    backlog_tokens: int = 0
    prefill_speed: int = 0
    prefill_measured: int = 0
    local_speed: int = 0
    local_measured: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    waiting_blocks: int = 0
    streams: int = 0
    waiting: int = 0


_NOTHING = _Share()


class FleetTotals:
    """Workers put themselves into `changed`; nobody looks at the others."""

    def __init__(self) -> None:
        self.changed: dict[Worker, None] = {}
        self._shares: dict[Worker, _Share] = {}
        self._sums = _NOTHING

    def forget(self, worker: Worker) -> None:
        """It is gone, and its measured speed with it."""
        self.changed.pop(worker, None)
        share = self._shares.pop(worker, _NOTHING)
        self._sums = _Share(*[a - b for a, b in zip(self._sums, share, strict=True)])

    def prefill_load(
        self, *, parked_tokens: int, arriving_tokens_per_second: float, idle_s: float
    ) -> PrefillLoad:
        sums = self._current()
        own = local = None
        if sums.prefill_measured:
            own = sums.prefill_speed * _SPEED_UNIT / sums.prefill_measured
        if sums.local_measured:
            local = sums.local_speed * _SPEED_UNIT / sums.local_measured
        return PrefillLoad(
            uncached_tokens=sums.backlog_tokens + parked_tokens,
            tokens_per_second=own or local,
            local_tokens_per_second=local,
            arriving_tokens_per_second=arriving_tokens_per_second,
            idle_s=idle_s,
        )

    def decode_load(self, *, parked_blocks: int, idle_s: float) -> DecodeLoad:
        sums = self._current()
        return DecodeLoad(
            used_blocks=sums.used_blocks,
            total_blocks=sums.total_blocks,
            waiting_blocks=sums.waiting_blocks + parked_blocks,
            streams=sums.streams,
            waiting=sums.waiting,
            idle_s=idle_s,
        )

    def _current(self) -> _Share:
        if self.changed:
            sums = list(self._sums)
            for worker in self.changed:
                share = _share(worker.state())
                before = self._shares.get(worker, _NOTHING)
                if share == before:
                    continue
                self._shares[worker] = share
                for place, (new, old) in enumerate(zip(share, before, strict=True)):
                    sums[place] += new - old
            self._sums = _Share(*sums)
            self.changed.clear()
        return self._sums


def _share(worker: WorkerState) -> _Share:
    speed = round(worker.tokens_per_second / _SPEED_UNIT)
    measured = 1 if speed else 0
    if worker.role is Role.PREFILL:
        return _Share(worker.backlog_tokens + worker.pending_tokens, speed, measured)
    if worker.draining:
        return _Share(worker.backlog_tokens, 0, 0, speed, measured, streams=worker.running)
    return _Share(
        worker.backlog_tokens,
        0,
        0,
        speed,
        measured,
        worker.total_blocks - worker.available_blocks,
        worker.total_blocks,
        worker.pending_blocks,
        worker.running,
        max(worker.waiting, worker.ungranted),
    )
