"""Which posted receive takes which message: the part every transport shares.

```
            receive()                                     message announced
               │                                                │
               ▼            same tag, oldest first              ▼
   posted[tag]: POSTED ────────────► MATCHED ◄──────── waiting[tag]: Arrival
               │                        │
   withdraw() ─┤                        ├─► the transport writes to the buffer, then finishes it
               ▼                        ▼
              DONE ◄──────────────────DONE
```

A `PendingReceive` belongs to the mailbox while POSTED, to the transport that writes to its buffer
while MATCHED, to nobody when DONE.
"""

import asyncio
import contextlib
import enum
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvrelay_protocol.errors import KvrelayError, TransferCancelled

from .transport import Receive

ArrivalT = TypeVar("ArrivalT", bound="Arrival")


REMEMBERED_TAGS = 8192
"""Late messages come within a round trip or two of their transfer's end."""


class State(enum.Enum):
    """Who owns a receive; see the module's drawing."""

    POSTED = enum.auto()
    MATCHED = enum.auto()
    DONE = enum.auto()


@dataclass(slots=True, eq=False)
class Arrival:
    """A message that was announced, and where it comes from."""

    tag: int
    nbytes: int


class PendingReceive(Receive):
    """A receive and its outcome; `interrupt` is how its transport stops a write under way."""

    def __init__(
        self,
        tag: int,
        view: memoryview,
        loop: asyncio.AbstractEventLoop,
        *,
        withdraw: Callable[["PendingReceive"], None],
        interrupt: Callable[["PendingReceive"], Awaitable[None]],
    ) -> None:
        self.tag = tag
        self.view = view
        self.state = State.POSTED
        self.cancelling = False
        self._withdraw = withdraw
        self._interrupt = interrupt
        self._outcome: asyncio.Future[int] = loop.create_future()

    @property
    def done(self) -> bool:
        return self.state is State.DONE

    async def wait(self) -> int:
        return await asyncio.shield(self._outcome)

    async def cancel(self) -> bool:
        if self.state is State.POSTED:
            self._withdraw(self)
            self.fail(TransferCancelled(f"receive {self.tag:#x} was cancelled"))
            return True
        if self.state is State.MATCHED:
            self.cancelling = True
            await self._interrupt(self)
            return self._was_cancelled()
        return False

    def _was_cancelled(self) -> bool:
        return isinstance(self._outcome.exception(), TransferCancelled)

    def finish(self, nbytes: int) -> None:
        """The message is in the buffer; nothing writes to it any more."""
        self.state = State.DONE
        self._outcome.set_result(nbytes)
        self._free()

    def fail(self, error: KvrelayError) -> None:
        """There will be no message; nothing writes to the buffer any more."""
        self.state = State.DONE
        self._outcome.set_exception(error)
        # An outcome nobody waits for is not a bug: cancelled leases leave such receives behind.
        self._outcome.exception()
        self._free()

    def _free(self) -> None:
        # The outcome may outlive the buffer: let go of it, so that its owner can resize or unmap it.
        self.view = memoryview(b"")

    async def settled(self) -> None:
        """Wait for the end without taking the outcome."""
        with contextlib.suppress(KvrelayError):
            await asyncio.shield(self._outcome)


@dataclass(slots=True)
class Mailbox(Generic[ArrivalT]):
    """Posted receives and waiting messages by tag; pure, so it is tested without I/O."""

    max_waiting: int
    """Messages without a receive that are kept; beyond it they are refused."""
    posted: dict[int, deque[PendingReceive]] = field(default_factory=dict)
    waiting: dict[int, deque[ArrivalT]] = field(default_factory=dict)
    waiting_count: int = 0
    over: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Tags of the latest transfers that ended: what still comes for them is late, and not kept."""

    def post(self, receive: PendingReceive) -> ArrivalT | None:
        """Post a receive, or return the waiting message it takes."""
        queue = self.waiting.get(receive.tag)
        if queue is None:
            self.posted.setdefault(receive.tag, deque()).append(receive)
            return None
        arrival = queue.popleft()
        self.waiting_count -= 1
        if not queue:
            del self.waiting[receive.tag]
        receive.state = State.MATCHED
        return arrival

    def arrive(self, arrival: ArrivalT) -> PendingReceive | None:
        """The receive that takes this message; None when it has to wait (or `full`)."""
        queue = self.posted.get(arrival.tag)
        if queue is None:
            if not self.full:
                self.waiting.setdefault(arrival.tag, deque()).append(arrival)
                self.waiting_count += 1
            return None
        receive = queue.popleft()
        if not queue:
            del self.posted[arrival.tag]
        receive.state = State.MATCHED
        return receive

    @property
    def full(self) -> bool:
        return self.waiting_count >= self.max_waiting

    def repost(self, receive: PendingReceive) -> ArrivalT | None:
        """Put a matched receive back to the front, as its message was taken back in time."""
        if receive.tag in self.waiting:
            return self.post(receive)
        receive.state = State.POSTED
        self.posted.setdefault(receive.tag, deque()).appendleft(receive)
        return None

    def withdraw(self, receive: PendingReceive) -> None:
        """Remove a posted receive."""
        queue = self.posted[receive.tag]
        queue.remove(receive)
        if not queue:
            del self.posted[receive.tag]

    def end(self, tag: int) -> list[ArrivalT]:
        """No receive will be posted for this tag again; returns the messages that waited for one."""
        self.over[tag] = None
        if len(self.over) > REMEMBERED_TAGS:
            self.over.popitem(last=False)
        late = list(self.waiting.pop(tag, ()))
        self.waiting_count -= len(late)
        return late

    def discard(self, unwanted: Callable[[ArrivalT], bool]) -> None:
        """Forget waiting messages, such as those of a peer that is gone."""
        for tag, queue in list(self.waiting.items()):
            kept = deque(arrival for arrival in queue if not unwanted(arrival))
            self.waiting_count -= len(queue) - len(kept)
            if kept:
                self.waiting[tag] = kept
            else:
                del self.waiting[tag]

    def drain(self) -> list[PendingReceive]:
        """Take out every posted receive and forget every waiting message."""
        receives = [receive for queue in self.posted.values() for receive in queue]
        self.posted.clear()
        self.waiting.clear()
        self.waiting_count = 0
        return receives

    def check_integrity(self) -> None:
        """Raise AssertionError when counts, queues and states disagree."""
        count = sum(len(queue) for queue in self.waiting.values())
        if self.waiting_count != count:
            raise AssertionError(f"{count} messages wait, {self.waiting_count} are counted")
        if missed := self.posted.keys() & self.waiting.keys():
            raise AssertionError(f"posted receives missed waiting messages: {missed}")
        states = {receive.state for queue in self.posted.values() for receive in queue}
        if not all(self.posted.values()) or states - {State.POSTED}:
            raise AssertionError(f"the queues of posted receives hold {states}, or nothing")
