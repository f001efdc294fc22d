"""What one end of a Join stream has still to say: in order, in as few writes as possible.

A gRPC message costs far more than what is in it: at both ends a turn of the loop, a poll and a change
of threads. So whatever waits leaves as one message, and what nobody waits for does not leave alone:

```
put(urgent)  ──► leaves in the next turn, behind everything that was put before it
put(patient) ──► leaves with the next urgent message, or by itself after LINGER_S
```

What leaves is numbered from 1, so that the other end (`incoming.py`) notices what it did not get.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from kvrelay_protocol import fleet_pb2 as pb

M = TypeVar("M", pb.WorkerMessage, pb.RouterMessage)

LINGER_S = 0.005
"""A patient message waits no longer than this for company."""
BATCH_BYTES = 1024 * 1024
"""Of the messages in a batch; a larger one goes alone. Far below what the other end accepts."""
_PATIENT = frozenset(
    {"sequence_started", "kv_sent", "kv_received", "heartbeat", "release_kv", "pulse", "all_sent"}
)
"""Reports, and the permission to let go: no token waits for one of them."""


class Outgoing(Generic[M]):
    """A line of messages and its one reader. Everything runs on one event loop."""

    def __init__(self, make: Callable[[], M], limit: int) -> None:
        """Args: `make` makes an empty message; `limit` bounds the messages that wait."""
        self._make: Callable[[], M] = make
        self._limit = limit
        self._waiting: deque[M] = deque()
        self._number = 0
        """Of the message written last."""
        self._ready = asyncio.Event()
        self._lingering = False
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: M) -> bool:
        """Put a message in line; never waits.

        Returns:
            Whether there was room.
        """
        if len(self._waiting) >= self._limit:
            return False
        self._waiting.append(message)
        if message.WhichOneof("message") not in _PATIENT:
            self._ready.set()
        elif not self._lingering and not self._ready.is_set():
            self._lingering = True
            asyncio.get_running_loop().call_later(LINGER_S, self._linger_over)
        return True

    def close(self) -> None:
        """Let the reader come to an end once it has everything."""
        self._closed = True
        self._ready.set()

    async def next(self) -> M | None:
        """What is to be written next, alone or as a batch, with its number; None after the end."""
        await self._ready.wait()
        message = self._bundle() if self._waiting else None
        if message is not None:
            self._number += 1
            message.number = self._number
        if not self._waiting and not self._closed:
            self._ready.clear()
        return message

    def _linger_over(self) -> None:
        # Never cancelled: where the message left early, one that came later leaves early as well.
        self._lingering = False
        if self._waiting:
            self._ready.set()

    def _bundle(self) -> M:
        first = self._waiting.popleft()
        if not self._waiting:
            return first
        taken, size = [first], first.ByteSize()
        while self._waiting:
            size += self._waiting[0].ByteSize()
            if size > BATCH_BYTES:
                break
            taken.append(self._waiting.popleft())
        if len(taken) == 1:
            return first
        batch: M = self._make()
        batch.batch.messages.extend(taken)
        return batch


def each(message: M, handle: Callable[[M], None]) -> None:
    """Handle every message in a message: itself, or those of a batch, in order.

    Raises:
        Exception: what `handle` raised first, once all of them were handled: one that fails does not
            cost its neighbours.
    """
    if message.WhichOneof("message") != "batch":
        handle(message)
        return
    failure: Exception | None = None
    messages: Iterable[M] = message.batch.messages
    for part in messages:
        try:
            handle(part)
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
