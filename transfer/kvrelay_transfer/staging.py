"""A bounded pool of equal host buffers between KV blocks and the transport.

```
free ──acquire()──► held by one transfer ──release()──► free        free + held = total
```

The pool is what bounds the memory in flight: a sender that finds none waits, in order.
"""

import asyncio
import mmap
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from .transport import Buffer, writable_bytes

Allocator = Callable[[int], Buffer]
"""Makes one writable buffer of the given size in bytes; a GPU worker passes pinned memory."""


def page_aligned(nbytes: int) -> Buffer:
    """Anonymous private memory, page aligned; freed with its last reference, even after SIGKILL."""
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Staging:
    """One buffer, held from `acquire` to `release`. `with staging:` releases at the end."""

    def __init__(self, pool: "StagingBuffers", index: int, view: memoryview) -> None:
        self.index = index
        self._view = view
        self._pool = pool

    @property
    def view(self) -> memoryview:
        """The whole buffer, writable.

        Raises:
            RuntimeError: it was released; somebody else may hold it by now.
        """
        if self._pool.holder(self.index) is not self:
            raise RuntimeError(f"staging buffer {self.index} is used after its release")
        return self._view

    def release(self) -> None:
        """Give the buffer back, exactly once.

        Raises:
            RuntimeError: it was released before.
        """
        self._pool.give_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class StagingBuffers:
    """`count` buffers of `nbytes` bytes each, allocated once. Used from one asyncio loop."""

    def __init__(self, count: int, nbytes: int, allocate: Allocator = page_aligned) -> None:
        if count < 1 or nbytes < 1:
            raise ValueError(f"a pool needs buffers of some size, not {count} of {nbytes} bytes")
        self.count = count
        self.nbytes = nbytes
        self._views = [writable_bytes(allocate(nbytes))[:nbytes] for _ in range(count)]
        # The last one given back is taken first: its pages exist, and some of it may be in a cache.
        self._free = list(range(count))
        self._held: dict[int, Staging] = {}
        self._waiters: deque[asyncio.Future[Staging]] = deque()

    @property
    def free(self) -> int:
        """Buffers nobody holds."""
        return len(self._free)

    @property
    def held(self) -> int:
        return len(self._held)

    def try_acquire(self) -> Staging | None:
        """A buffer now, or None; never overtakes a task that waits."""
        if self._waiters or not self._free:
            return None
        return self._hold(self._free.pop())

    async def acquire(self) -> Staging:
        """A buffer, first come first served. Cancelling the wait takes nothing."""
        if (staging := self.try_acquire()) is not None:
            return staging
        waiter: asyncio.Future[Staging] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            # Handed over in the same turn as the cancel: nobody else knows of it.
            if waiter.done() and not waiter.cancelled():
                waiter.result().release()
            raise

    def holder(self, index: int) -> Staging | None:
        return self._held.get(index)

    def give_back(self, staging: Staging) -> None:
        """See `Staging.release`."""
        if self._held.get(staging.index) is not staging:
            raise RuntimeError(f"staging buffer {staging.index} is released twice")
        del self._held[staging.index]
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(self._hold(staging.index))
                return
        self._free.append(staging.index)

    def _hold(self, index: int) -> Staging:
        staging = self._held[index] = Staging(self, index, self._views[index])
        return staging

    def check_integrity(self) -> None:
        """Raise AssertionError unless every buffer is either free or held, exactly once."""
        indices = sorted([*self._free, *self._held])
        if indices != list(range(self.count)):
            raise AssertionError(f"{self.count} buffers, but free and held are {indices}")
        if any(staging.index != index for index, staging in self._held.items()):
            raise AssertionError("a buffer is held under another's number")
        if self._free and any(not waiter.done() for waiter in self._waiters):
            raise AssertionError("a task waits beside a free buffer")
