"""A source of targets that a test sets, and a provider that writes down what it is told."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvrelay_infra.providers import Pool, PoolStatus

MODEL = "demo"


class Source:
    """`decide`'s answers, set by hand."""

    def __init__(self) -> None:
        self.wanted: dict[str, int] = {"prefill": 0, "decode": 0}
        self._waiting: set[asyncio.Future[None]] = set()

    def want(self, **pools: int | None) -> None:
        """Set a pool's target; None: nothing is known of it."""
        for pool, replicas in pools.items():
            self.wanted.pop(pool, None)
            if replicas is not None:
                self.wanted[pool] = replicas
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    def targets(self) -> Mapping[str, int]:
        return self.wanted

    def active(self, pool: str) -> bool:
        return self.wanted.get(pool, 0) > 0

    async def changed(self) -> None:
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)


@dataclass
class RecordingProvider:
    replicas: dict[Pool, int] = field(default_factory=lambda: dict.fromkeys(Pool, 0))
    calls: list[tuple[Pool, int]] = field(default_factory=list)

    async def scale(self, pool: Pool, replicas: int) -> None:
        self.replicas[pool] = replicas
        self.calls.append((pool, replicas))

    async def describe(self) -> Mapping[Pool, PoolStatus]:
        return {pool: PoolStatus(n, n, 0) for pool, n in self.replicas.items()}

    async def close(self) -> None:
        pass
