"""A transport within one process: the semantics of UCX without its libraries, plus faults.

Messages up to `SMALL` bytes are copied when they are sent (`send` returns at once), longer ones
meet a posted receive first and are then copied chunk by chunk, giving the loop a turn between
chunks: so a cancel or a lost peer can hit the middle of a message here too.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from kvrelay_protocol.errors import PeerLost, TransferCancelled, TransportMisconfigured

from .matching import Arrival, Mailbox, PendingReceive
from .transport import (
    Buffer,
    KVTransport,
    Receive,
    TransportStats,
    Truncated,
    readable_bytes,
    writable_bytes,
)

SMALL = 8000
CHUNK = 1024 * 1024
MAX_WAITING = 1024

# Address -> the transport that listens there. The one place where transports of a process meet.
_LISTENING: dict[bytes, "InprocTransport"] = {}

FaultKind = Literal["corrupt", "truncate", "delay", "drop", "duplicate", "lose_peer"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong with one message."""

    kind: FaultKind
    nth: int = 0
    """Which message this transport sends, counted from 0 (per tag where `tag` is given)."""
    tag: int | None = None
    at: int = 0
    """corrupt: the bit that flips. truncate: the bytes that are left. lose_peer: bytes written."""
    seconds: float = 0.0
    """delay: how long the message waits before it is announced."""


@dataclass(slots=True)
class Faults:
    """What a test makes go wrong with the messages a transport sends."""

    plan: list[Fault] = field(default_factory=list)
    fired: list[Fault] = field(default_factory=list)
    _total: int = 0
    _by_tag: dict[int, int] = field(default_factory=dict)

    def take(self, tag: int) -> list[Fault]:
        """The faults of the next message with this tag; each fires once."""
        total, of_tag = self._total, self._by_tag.get(tag, 0)
        self._total += 1
        self._by_tag[tag] = of_tag + 1
        hits = [
            fault
            for fault in self.plan
            if (
                fault.nth == total if fault.tag is None else (fault.tag, fault.nth) == (tag, of_tag)
            )
        ]
        self.plan = [fault for fault in self.plan if fault not in hits]
        self.fired += hits
        return hits


@dataclass(slots=True, eq=False)
class _Message(Arrival):
    """A message between two transports. `data` is the sender's buffer, or a copy if small."""

    data: memoryview
    source: "InprocTransport"
    lose_after: int | None = None
    sent: asyncio.Future[None] = field(kw_only=True)
    cancelled: bool = False
    task: asyncio.Task[None] | None = None

    def settle(self, error: Exception | None = None) -> None:
        if self.sent.done():
            return
        if error is None:
            self.sent.set_result(None)
        else:
            self.sent.set_exception(error)
            # A small message's sender is gone already; its error has nobody to tell.
            self.sent.exception()


class InprocTransport(KVTransport):
    """See the module. `faults` concerns the messages this side sends."""

    scheme: ClassVar[str] = "inproc"

    def __init__(self, *, faults: Faults | None = None, max_waiting: int = MAX_WAITING) -> None:
        self.stats = TransportStats()
        self.chosen = self.scheme
        self._faults = faults or Faults()
        self._mailbox: Mailbox[_Message] = Mailbox(max_waiting)
        self._address = b""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outgoing: set[_Message] = set()
        self._incoming: dict[PendingReceive, _Message] = {}
        self._writing: set[asyncio.Task[None]] = set()

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> "InprocTransport":
        if options:
            raise TransportMisconfigured(f"inproc:// has no options; got {', '.join(options)}")
        return cls()

    @property
    def address(self) -> bytes:
        return self._address

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._address = b"inproc:" + secrets.token_hex(16).encode()
        _LISTENING[self._address] = self

    def transport_of(self, peer: bytes) -> str:
        return "inproc" if peer in _LISTENING else ""

    # -- sending

    def connect(self, peer: bytes) -> None:
        """Nothing to do: a peer of this process is a look-up away."""

    async def send(self, peer: bytes, tag: int, buffer: Buffer) -> None:
        data = readable_bytes(buffer)
        faults = self._faults.take(tag)
        for fault in faults:
            if fault.kind == "delay":
                await asyncio.sleep(fault.seconds)
        target = self._reach(peer)
        message = self._message(tag, data, faults)
        self.stats.messages_sent += 1
        self.stats.bytes_sent += len(data)
        if any(fault.kind == "drop" for fault in faults):
            return
        target.accept(message)
        if any(fault.kind == "duplicate" for fault in faults):
            target.accept(self._message(tag, memoryview(bytes(data)), []))
        if len(data) <= SMALL:
            return
        self._outgoing.add(message)
        try:
            await asyncio.shield(message.sent)
        except asyncio.CancelledError:
            await target.recall(message)
            self.stats.cancelled += 1
            raise
        finally:
            self._outgoing.discard(message)
            message.data = memoryview(b"")
            # A traceback somebody keeps must not keep the caller's buffer exported.
            data.release()

    def _reach(self, peer: bytes) -> "InprocTransport":
        if self._loop is None or self._address not in _LISTENING:
            raise TransferCancelled("the transport is closed")
        if peer not in _LISTENING:
            self.stats.peers_lost += 1
            raise PeerLost(f"no transport listens at {peer!r}")
        return _LISTENING[peer]

    def _message(self, tag: int, data: memoryview, faults: list[Fault]) -> _Message:
        if len(data) <= SMALL:
            data = memoryview(bytes(data))
        lose_after = None
        for fault in faults:
            if fault.kind == "corrupt":
                flipped = bytearray(data)
                flipped[fault.at // 8 % max(len(flipped), 1)] ^= 1 << fault.at % 8
                data = memoryview(flipped)
            elif fault.kind == "truncate":
                data = data[: fault.at]
            elif fault.kind == "lose_peer":
                lose_after = fault.at
        sent = asyncio.get_running_loop().create_future()
        return _Message(tag, len(data), data, self, lose_after, sent=sent)

    # -- receiving

    def receive(self, tag: int, buffer: Buffer) -> Receive:
        if self._loop is None or self._address not in _LISTENING:
            raise TransferCancelled("the transport is closed")
        receive = PendingReceive(
            tag,
            writable_bytes(buffer),
            self._loop,
            withdraw=self._withdraw,
            interrupt=self._interrupt,
        )
        message = self._mailbox.post(receive)
        if message is not None:
            self._begin(message, receive)
        return receive

    def end(self, tag: int) -> None:
        for message in self._mailbox.end(tag):
            self._refuse_late(message)

    def _refuse_late(self, message: _Message) -> None:
        self.stats.late += 1
        message.settle(TransferCancelled("refused: the transfer is over"))

    def accept(self, message: _Message) -> None:
        """A message of another transport arrives here."""
        if message.tag in self._mailbox.over:
            self._refuse_late(message)
            return
        if self._mailbox.full and message.tag not in self._mailbox.posted:
            self.stats.refused += 1
            message.settle(
                TransferCancelled(f"refused: {self._mailbox.max_waiting} messages wait already")
            )
            return
        receive = self._mailbox.arrive(message)
        if receive is not None:
            self._begin(message, receive)

    def _withdraw(self, receive: PendingReceive) -> None:
        self._mailbox.withdraw(receive)
        self.stats.cancelled += 1

    def _begin(self, message: _Message, receive: PendingReceive) -> None:
        if message.nbytes > len(receive.view):
            text = f"a message of {message.nbytes} bytes for a buffer of {len(receive.view)}"
            receive.fail(Truncated(text))
            message.settle(TransferCancelled(f"the receiver refused {text}"))
        elif message.nbytes <= SMALL and message.lose_after is None:
            receive.view[: message.nbytes] = message.data
            self._finish(message, receive)
        else:
            self._incoming[receive] = message
            message.task = asyncio.get_running_loop().create_task(self._write(message, receive))
            self._writing.add(message.task)
            message.task.add_done_callback(self._writing.discard)

    async def _write(self, message: _Message, receive: PendingReceive) -> None:
        for start in range(0, max(message.nbytes, 1), CHUNK):
            await asyncio.sleep(0)
            if receive.cancelling or message.cancelled:
                receive.fail(TransferCancelled(f"receive {receive.tag:#x} was cancelled half-way"))
                message.settle(TransferCancelled("the receiver cancelled half-way"))
                self.stats.cancelled += 1
                break
            if message.lose_after is not None and start >= message.lose_after:
                message.source.vanish()
            if message.source.address not in _LISTENING:
                receive.fail(PeerLost("the sender went away in the middle of a message"))
                message.settle(PeerLost("the transport was aborted"))
                self.stats.peers_lost += 1
                break
            if self._address not in _LISTENING:
                receive.fail(TransferCancelled("the transport was closed"))
                message.settle(PeerLost("the receiver went away in the middle of a message"))
                message.source.stats.peers_lost += 1
                break
            end = min(start + CHUNK, message.nbytes)
            receive.view[start:end] = message.data[start:end]
        else:
            self._finish(message, receive)
        self._incoming.pop(receive, None)

    def _finish(self, message: _Message, receive: PendingReceive) -> None:
        self.stats.messages_received += 1
        self.stats.bytes_received += message.nbytes
        receive.finish(message.nbytes)
        message.settle()

    async def _interrupt(self, receive: PendingReceive) -> None:
        await receive.settled()

    async def recall(self, message: _Message) -> None:
        """The sender cancels: take the message back, or stop writing it; then the buffer is free."""
        message.cancelled = True
        if message.task is not None:
            await _uninterrupted(message.task)
        else:
            self._mailbox.discard(lambda waiting: waiting is message)

    # -- the end

    async def close(self) -> None:
        """Unmatched long messages can't reach anyone any more: they fail as cancelled."""
        if self._address not in _LISTENING:
            return
        if self._writing:
            await asyncio.wait(set(self._writing))
        sending = {message.task for message in self._outgoing if message.task}
        if sending:
            await asyncio.wait(sending)
        await self.abort()

    async def abort(self) -> None:
        self.vanish()
        if self._writing:
            await asyncio.wait(set(self._writing))

    def vanish(self) -> None:
        """Leave the registry at once, as a killed process would."""
        if _LISTENING.pop(self._address, None) is None:
            return
        for message in [m for queue in self._mailbox.waiting.values() for m in queue]:
            message.settle(PeerLost("the receiver went away"))
        for receive in self._mailbox.drain():
            receive.fail(TransferCancelled("the transport was closed"))
        for other in _LISTENING.values():
            other.forget(self)
        for message in self._outgoing:
            if message.task is None:
                message.settle(TransferCancelled("the transport was closed"))

    def forget(self, gone: "InprocTransport") -> None:
        """Drop what `gone` announced and nobody took; small messages had left it already."""
        self._mailbox.discard(lambda m: m.source is gone and m.nbytes > SMALL)

    def check_integrity(self) -> None:
        self._mailbox.check_integrity()


async def _uninterrupted(task: "asyncio.Task[None]") -> None:
    """Wait for a task even if the waiter is cancelled again; the first cancel is raised anyway."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})


__all__ = ["Fault", "FaultKind", "Faults", "InprocTransport"]
