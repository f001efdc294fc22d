"""The provider that starts nothing itself: it remembers the numbers, and KEDA asks for them."""

import asyncio
from collections.abc import Mapping


class AskedTargets:
    """A `Provider` to the scaler's loop, a `ScalingSource` to KEDA. One event loop owns it."""

    def __init__(self) -> None:
        self._targets: dict[str, int] = {}
        self._waiting: set[asyncio.Future[None]] = set()

    async def scale(self, pool: str, replicas: int) -> None:
        """Note a pool's number and wake whoever waits for it."""
        self._targets[pool] = replicas
        waiting, self._waiting = self._waiting, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def targets(self) -> Mapping[str, int]:
        """See `ScalingSource`; nothing is known of a pool before the first decision about it."""
        return self._targets

    def active(self, pool: str) -> bool:
        """See `ScalingSource`."""
        return self._targets.get(pool, 0) > 0

    async def changed(self) -> None:
        """See `ScalingSource`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)
