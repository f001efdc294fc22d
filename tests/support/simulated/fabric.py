"""The KV plane as a set of messages under way, each moved one step at a time by whoever tests.

```
 send() ─► FLYING ──arrive──► WAITING ─(receive posted)─► MATCHED ──► HALF ──► done
              │ same sender and tag: in order                 │         │
              └──── recalled, dropped ───────────┘            └─ cancelled, peer lost ─► failed
```

Messages of different tags overtake each other freely. What UCX may do to a buffer is checked at every step:
the sender's is read, the receiver's is written, and both must still be held by who posted them.
"""

import asyncio
import contextlib
import enum
from dataclasses import dataclass, field
from typing import ClassVar

from kvrelay_protocol.errors import PeerLost, TransferCancelled
from kvrelay_transfer.matching import Arrival, Mailbox, PendingReceive
from kvrelay_transfer.staging import StagingBuffers
from kvrelay_transfer.transport import (
    Buffer,
    KVTransport,
    Receive,
    TransportStats,
    Truncated,
    readable_bytes,
    writable_bytes,
)

SMALL = 400
"""Up to here a message leaves its buffer at once, as UCX's eager ones do; hand-over records do."""


class Stage(enum.Enum):
    FLYING = enum.auto()
    WAITING = enum.auto()
    MATCHED = enum.auto()
    HALF = enum.auto()
    OVER = enum.auto()


@dataclass(slots=True, eq=False)
class Flight(Arrival):
    """A message under way."""

    data: memoryview
    source: "SimTransport"
    address: bytes
    sent: asyncio.Future[None]
    snapshot: bytes
    """What the sender meant: its buffer must not change while this is under way."""
    stage: Stage = Stage.FLYING
    receive: PendingReceive | None = None
    target: "SimTransport | None" = None
    cancelled: bool = False
    flips: list[int] = field(default_factory=list)
    cut: int | None = None

    @property
    def can_end(self) -> bool:
        """It needs nothing more of its sender."""
        cancelled = self.receive is not None and self.receive.cancelling
        return self.nbytes <= SMALL or cancelled

    @property
    def delivered(self) -> bytes:
        data = bytearray(self.data)
        for bit in self.flips:
            data[bit // 8 % len(data)] ^= 1 << bit % 8
        return bytes(data[: self.cut])


@dataclass(slots=True)
class Fabric:
    """All transports, and every message between them."""

    listening: dict[bytes, "SimTransport"] = field(default_factory=dict)
    flights: list[Flight] = field(default_factory=list)
    history: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    """Address, tag and bytes of whatever was sent: what a stranger may have recorded."""

    def movable(self) -> list[Flight]:
        """Flights that something can happen to now."""
        found: list[Flight] = []
        first: set[tuple[int, bytes, int]] = set()
        for flight in self.flights:
            stream = (id(flight.source), flight.address, flight.tag)
            if flight.stage is Stage.FLYING and stream not in first:
                first.add(stream)
                found.append(flight)
            elif flight.stage in (Stage.MATCHED, Stage.HALF) or self._orphan(flight):
                found.append(flight)
        return found

    def _orphan(self, flight: Flight) -> bool:
        sender_lost = flight.source.dead and flight.nbytes > SMALL
        receiver_lost = flight.target is not None and flight.target.dead
        return flight.stage is Stage.WAITING and (sender_lost or receiver_lost)

    def move(self, flight: Flight) -> None:
        """The next thing that happens to it."""
        if flight.source.dead and flight.nbytes > SMALL:
            self.lose(flight, "the sender died")
        elif flight.stage is Stage.FLYING:
            self._arrive(flight)
        elif flight.target is not None and flight.target.dead:
            self.lose(flight, "the receiver died")
        elif flight.cancelled or (flight.receive is not None and flight.receive.cancelling):
            self._stop(flight)
        elif flight.stage is Stage.MATCHED:
            self._begin(flight)
        else:
            self._finish(flight)

    def lose(self, flight: Flight, why: str) -> None:
        """One end is gone; the other hears of it now."""
        if flight.receive is not None and not flight.receive.done:
            flight.receive.fail(PeerLost(why))
        elif flight.target is not None:
            flight.target.mailbox.discard(lambda waiting: waiting is flight)
        self._settle(flight, PeerLost(why))

    def drop(self, flight: Flight) -> None:
        """It never arrives, and its sender does not notice."""
        if flight.target is not None:
            flight.target.mailbox.discard(lambda waiting: waiting is flight)
        self._settle(flight)

    def inject(self, address: bytes, tag: int, data: bytes, *, flip: int | None = None) -> Flight:
        """A stranger's message, damaged or not."""
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
        stranger = SimTransport(self, b"stranger")
        flight = Flight(tag, len(data), memoryview(data), stranger, address, future, data)
        flight.flips += [] if flip is None else [flip]
        self.flights.append(flight)
        return flight

    def _arrive(self, flight: Flight) -> None:
        target = self.listening.get(flight.address)
        if target is None:
            self.lose(flight, f"nobody listens at {flight.address!r}")
            return
        flight.target = target
        if flight.tag in target.mailbox.over or target.mailbox.full:
            self._settle(flight, TransferCancelled("refused: the transfer is over"))
            return
        receive = target.mailbox.arrive(flight)
        if receive is None:
            flight.stage = Stage.WAITING
        else:
            self.match(flight, receive)

    def match(self, flight: Flight, receive: PendingReceive) -> None:
        flight.receive, flight.stage = receive, Stage.MATCHED

    def _begin(self, flight: Flight) -> None:
        assert flight.receive is not None
        if flight.nbytes > len(flight.receive.view):
            text = f"a message of {flight.nbytes} bytes for {len(flight.receive.view)}"
            flight.receive.fail(Truncated(text))
            self._settle(flight, TransferCancelled(f"refused {text}"))
            return
        self._write(flight, len(flight.delivered) // 2)
        flight.stage = Stage.HALF

    def _finish(self, flight: Flight) -> None:
        assert flight.receive is not None and flight.target is not None
        data = flight.delivered
        self._write(flight, len(data))
        stats = flight.target.stats
        stats.messages_received += 1
        stats.bytes_received += len(data)
        flight.receive.finish(len(data))
        self._settle(flight)

    def _write(self, flight: Flight, nbytes: int) -> None:
        assert flight.receive is not None and flight.target is not None
        if flight.nbytes > SMALL and flight.source.staging is not None:
            flight.source.check_held(flight.data, "read by a send")
        assert bytes(flight.data) == flight.snapshot, "a buffer changed while it was being sent"
        flight.target.check_held(flight.receive.view, "written by a receive")
        flight.receive.view[:nbytes] = flight.delivered[:nbytes]

    def _stop(self, flight: Flight) -> None:
        assert flight.receive is not None
        # Whoever cancels does not know how far it is: it goes on until the cancel is confirmed.
        self._write(flight, min(len(flight.delivered), len(flight.receive.view)))
        flight.receive.fail(TransferCancelled("cancelled half-way"))
        self._settle(flight, TransferCancelled("cancelled half-way"))

    def _settle(self, flight: Flight, error: Exception | None = None) -> None:
        flight.stage = Stage.OVER
        self.flights.remove(flight)
        if not flight.sent.done():
            if error is None:
                flight.sent.set_result(None)
            else:
                flight.sent.set_exception(error)
                flight.sent.exception()

    def recall(self, flight: Flight) -> None:
        """The sender cancels: at once while nobody writes it, else at the next step."""
        if flight.stage in (Stage.FLYING, Stage.WAITING):
            if flight.target is not None:
                flight.target.mailbox.discard(lambda waiting: waiting is flight)
            self._settle(flight, TransferCancelled("recalled"))
        else:
            flight.cancelled = True


class SimTransport(KVTransport):
    """One end of the fabric. A dead one neither sends nor hears."""

    scheme: ClassVar[str] = "sim"

    def __init__(self, fabric: Fabric, address: bytes) -> None:
        self.stats = TransportStats()
        self.mailbox: Mailbox[Flight] = Mailbox(64)
        self.dead = False
        self.staging: StagingBuffers | None = None
        self.memory: list[bytearray] = []
        self.tags: set[int] = set()
        """Of every receive that was ever posted here."""
        self._fabric = fabric
        self._address = address

    @property
    def address(self) -> bytes:
        return self._address

    def allocate(self, nbytes: int) -> Buffer:
        """Memory for staging buffers that `check_held` can find again."""
        self.memory.append(bytearray(nbytes))
        return self.memory[-1]

    def check_held(self, view: memoryview, how: str) -> None:
        assert self.staging is not None
        index = next(i for i, memory in enumerate(self.memory) if memory is view.obj)
        assert self.staging.holder(index) is not None, f"a free staging buffer is {how}"

    async def start(self) -> None:
        self._fabric.listening[self._address] = self

    def connect(self, peer: bytes) -> None:
        pass

    def transport_of(self, peer: bytes) -> str:
        return "sim"

    async def send(self, peer: bytes, tag: int, buffer: Buffer) -> None:
        loop = asyncio.get_running_loop()
        if self.dead:
            await loop.create_future()
        if peer not in self._fabric.listening:
            raise PeerLost(f"nobody listens at {peer!r}")
        data = readable_bytes(buffer)
        snapshot = bytes(data)
        self._fabric.history.append((peer, tag, snapshot))
        small = len(data) <= SMALL
        flight = Flight(
            tag,
            len(data),
            memoryview(snapshot) if small else data,
            self,
            peer,
            loop.create_future(),
            snapshot,
        )
        self._fabric.flights.append(flight)
        if small:
            return
        try:
            await asyncio.shield(flight.sent)
        except asyncio.CancelledError:
            self._fabric.recall(flight)
            while not flight.sent.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({flight.sent})
            raise

    def receive(self, tag: int, buffer: Buffer) -> Receive:
        receive = PendingReceive(
            tag,
            writable_bytes(buffer),
            asyncio.get_running_loop(),
            withdraw=self.mailbox.withdraw,
            interrupt=lambda pending: pending.settled(),
        )
        self.tags.add(tag)
        flight = self.mailbox.post(receive)
        if flight is not None:
            self._fabric.match(flight, receive)
        return receive

    def end(self, tag: int) -> None:
        for flight in self.mailbox.end(tag):
            self._fabric._settle(flight, TransferCancelled("refused: the transfer is over"))

    def die(self) -> None:
        self.dead = True
        if self._fabric.listening.get(self._address) is self:
            del self._fabric.listening[self._address]

    async def close(self) -> None:
        self.die()

    async def abort(self) -> None:
        self.die()
