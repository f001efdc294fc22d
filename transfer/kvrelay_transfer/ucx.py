"""KV messages over UCX, two-sided and pushed by the owner of the blocks.

Small messages travel inside one control message. A longer one is announced, and moves when the
receiver has a buffer for it:

```
 sender                                            receiver
   │ ANNOUNCE(message, tag, bytes, piece size) ───────► matched with a posted receive, or waits
   │ ◄──────────────────────── READY(message, data tag) │ every piece's receive is posted to UCX
   │ piece 0, piece 1, ... (UCX tag messages) ════════► │
   │ ABANDON(message, pieces sent) ───────────────────► │ sender cancelled, or answers STOP
   │ ◄──────────────────────────────────── STOP(message)│ receiver cancelled
   │ ◄──────────────────────────────── REFUSE(message)  │ buffer too short, or too many waiting
```

Why a rendezvous of our own above that of UCX, for one more round trip (about 0.1 ms on loopback):
UCX can cancel neither a send nor a matched receive, does not say how long a message was, queues
unexpected messages without bound, and does not tell a receiver who is sending. Here a cancel before
READY touches no buffer, and one after it waits for at most `window` pieces.

A connection begins with a HELLO that is long enough for UCX's own rendezvous, and nothing else is said
before the answer. Only so does UCX tell the other side of its choice of devices before that side makes
an endpoint of its own: UCX 1.21 aborts a process (wireup.c:1087) that has made one over other devices,
as two hosts with unlike sets of them do, once a rendezvous begins.

A peer is lost when its endpoint reports an error, when it does not answer the first message in
time, or when a cancel has to be confirmed and it does not react. Then the endpoint is closed by
force, which makes UCX give up every piece under way; only after that are buffers called free.
"""

import asyncio
import contextlib
import enum
import logging
import secrets
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from kvrelay_protocol.errors import (
    KvrelayError,
    PeerLost,
    TransferCancelled,
    TransportMisconfigured,
)

from .matching import Arrival, Mailbox, PendingReceive
from .transport import (
    MAX_TAG,
    Buffer,
    KVTransport,
    Receive,
    TransportStats,
    Truncated,
    readable_bytes,
    writable_bytes,
)
from .ucx_env import UcxOptions, carries, check_resources, ucx_config
from .ucx_worker import Endpoint, Op, UcxWorker, load_ucx

logger = logging.getLogger(__name__)

# Control message: magic, kind, payload bytes, sender, message number, two values.
_CONTROL = struct.Struct("<4sHHQQQQ")
_MAGIC = b"KVC1"
_CONTROL_BYTES = 8191
"""The longest message that UCX sends eagerly in one fragment with RNDV_THRESH=8192."""
INLINE_BYTES = 8000
"""Messages up to this length travel inside a control message."""
_POSTED_CONTROLS = 16
_HELLO_BYTES = 8448
"""Of a HELLO, padded: more than the RNDV_THRESH of 8192."""
_POSTED_HELLOS = 8
_OUT_OF_REACH_S = 2.0
_ADDRESS = struct.Struct("<4sQQ")
_ADDRESS_MAGIC = b"KVU2"
_ALL_SENT = MAX_TAG


class _Kind(enum.IntEnum):
    """Kinds of control message; `value` and `extra` in brackets."""

    HELLO = 1  # alone until WELCOME, on a tag of its own; payload: address of the sender [endpoint number]
    WELCOME = 2  # answer to HELLO
    INLINE = 3  # payload: a whole message [tag]
    ANNOUNCE = 4  # [tag, bytes]; payload: piece size
    READY = 5  # [data tag]
    ABANDON = 6  # [pieces sent]
    STOP = 7
    REFUSE = 8  # payload: reason
    FLUSH = 9  # [number]
    FLUSHED = 10  # [number]


class _Control(NamedTuple):
    """What a control message says, apart from who says it."""

    kind: _Kind
    number: int
    value: int
    extra: int
    payload: bytes


@dataclass(slots=True, eq=False)
class _Peer:
    """One remote transport and what is under way with it. A lost peer is never revived."""

    ident: int
    address: bytes
    control_tag: int
    endpoint: Endpoint
    lost: PeerLost | None = None
    welcomed: bool = False
    outbox: list[tuple[memoryview, Callable[[Exception | None], None]]] = field(
        default_factory=list
    )
    """Control messages that wait for the welcome."""
    met: asyncio.Event = field(default_factory=asyncio.Event)
    """Welcomed, or lost before."""
    their_number: int | None = None
    """Number of the remote's endpoint to us; another one means that it has started over."""
    sends: "dict[int, _Sending]" = field(default_factory=dict)
    incoming: "dict[int, _Incoming]" = field(default_factory=dict)
    flushes: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    lanes: str = ""


@dataclass(slots=True, eq=False)
class _Sending:
    """A long message on its way out. UCX reads `data` while `under_way` is not 0."""

    number: int
    data: memoryview
    outcome: asyncio.Future[None]
    data_tag: int | None = None
    next_byte: int = 0
    pieces: int = 0
    under_way: int = 0
    stopped: KvrelayError | None = None


@dataclass(slots=True, eq=False)
class _Announced(Arrival):
    """A message that waits for a receive: long and announced, or short and here already."""

    peer: _Peer
    number: int
    piece: int = 0
    payload: bytes | None = None


@dataclass(slots=True, eq=False)
class _Incoming:
    """A long message on its way in. UCX may write to the buffer while `left` is not 0."""

    announced: _Announced
    receive: PendingReceive
    ops: list[Op]
    left: int
    sent: int | None = None
    """Pieces the sender had sent when it gave up."""
    error: Exception | None = None


class UcxTransport(KVTransport):
    """See the module. One UCX worker, one endpoint per peer."""

    scheme: ClassVar[str] = "ucx"

    def __init__(self, options: UcxOptions | None = None) -> None:
        self.options = options or UcxOptions()
        self.stats = TransportStats()
        self.chosen = ""
        self._ident = secrets.randbits(64)
        self._control_tag = secrets.randbits(64)
        self._mailbox: Mailbox[_Announced] = Mailbox(self.options.max_waiting)
        self._peers: dict[int, _Peer] = {}
        self._out_of_reach: dict[int, float] = {}
        """When a peer could not be connected to, by its number."""
        self._lost: set[_Peer] = set()
        """Lost peers that UCX still holds buffers of."""
        self._numbers = iter(range(1, MAX_TAG))
        self._address = b""
        self._worker: UcxWorker | None = None
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> "UcxTransport":
        load_ucx()
        return cls(UcxOptions.parse(options))

    @property
    def address(self) -> bytes:
        return self._address

    async def start(self) -> None:
        config = ucx_config(self.options)
        self._loop = asyncio.get_running_loop()
        hint = f"UCX_TLS={config['TLS']!r}, UCX_NET_DEVICES={config['NET_DEVICES']!r}"
        fix = "unset both, or name a transport and a device that exist here (UCX_TLS=tcp)"
        try:
            self._worker = UcxWorker(config, self._check_peers)
            check_resources(self._worker.resources)
            self.chosen = await self._worker.self_test()
        except Exception as error:
            self._drop_worker()
            raise TransportMisconfigured(
                f"UCX does not work with {hint}: {error}; {fix}"
            ) from error
        self._check_required(hint)
        own = self._worker.address
        self._address = _ADDRESS.pack(_ADDRESS_MAGIC, self._ident, self._control_tag) + own
        for _ in range(_POSTED_CONTROLS):
            self._post_control(memoryview(bytearray(_CONTROL_BYTES)), self._control_tag)
        for _ in range(_POSTED_HELLOS):
            self._post_control(memoryview(bytearray(_HELLO_BYTES)), _hello_tag(self._control_tag))
        logger.info("UCX transport started over %s", self.chosen)

    def _check_required(self, hint: str) -> None:
        wanted, lanes = self.options.require, self.chosen
        if wanted and not carries(lanes, wanted):
            self._drop_worker()
            raise TransportMisconfigured(
                f"--require-transport {wanted}: UCX chose {lanes} with {hint}; "
                "check drivers, UCX_TLS and UCX_NET_DEVICES, or demand what is there"
            )

    def _on_welcome(self, remote: _Peer) -> None:
        """Connected both ways: what UCX chose for this peer is final."""
        lanes = self.transport_of(remote.address)
        logger.info("peer %016x is reached over %s", remote.ident, lanes)
        wanted = self.options.require
        if wanted and lanes and not carries(lanes, wanted):
            reason = f"--require-transport {wanted}: UCX chose {lanes} for it"
            logger.error("peer %016x is given up: %s", remote.ident, reason)
            self._lose(remote, reason)

    def transport_of(self, peer: bytes) -> str:
        ident = _ADDRESS.unpack_from(peer)[1] if len(peer) >= _ADDRESS.size else 0
        remote = self._peers.get(ident)
        if remote is None or not remote.welcomed:
            return ""
        remote.lanes = remote.lanes or remote.endpoint.lanes
        return remote.lanes

    # -- sending

    def connect(self, peer: bytes) -> None:
        with contextlib.suppress(KvrelayError):
            self._reach(peer)

    async def send(self, peer: bytes, tag: int, buffer: Buffer) -> None:
        data = readable_bytes(buffer)
        remote = self._reach(peer)
        size = len(data)
        try:
            if size <= INLINE_BYTES:
                await self._say_and_wait(remote, _Kind.INLINE, value=tag, payload=bytes(data))
            else:
                await self._send_long(remote, tag, data)
        finally:
            # A traceback somebody keeps must not keep the caller's buffer exported.
            data.release()
        self.stats.messages_sent += 1
        self.stats.bytes_sent += size

    async def _send_long(self, remote: _Peer, tag: int, data: memoryview) -> None:
        outcome = asyncio.get_running_loop().create_future()
        sending = _Sending(next(self._numbers), data, outcome)
        remote.sends[sending.number] = sending
        piece = self.options.chunk_bytes.to_bytes(8, "little")
        self._say(remote, _Kind.ANNOUNCE, sending.number, tag, extra=len(data), payload=piece)
        try:
            await asyncio.shield(outcome)
        except asyncio.CancelledError:
            await self._retract(remote, sending)
            raise
        finally:
            sending.data = memoryview(b"")

    async def _retract(self, remote: _Peer, sending: _Sending) -> None:
        """Cancel a send and return when UCX does not read its buffer any more."""
        self.stats.cancelled += 1
        sending.stopped = sending.stopped or TransferCancelled("the sender cancelled")
        if not sending.outcome.done():  # else the peer or this transport ended it in the same turn
            self._pump(remote, sending)
        await self._confirm(sending.outcome, remote)
        # The caller is told of its own cancel; what became of the message does not matter to it.
        if not sending.outcome.cancelled():
            sending.outcome.exception()

    async def _confirm(self, outcome: "asyncio.Future[None]", remote: _Peer) -> None:
        """Wait for a cancel to take effect, by force after the grace period; not interruptible."""
        loop = asyncio.get_running_loop()
        grace = loop.call_later(
            self.options.cancel_grace_s, self._lose, remote, "it does not react to a cancel"
        )
        while not outcome.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({outcome})
        grace.cancel()

    def _pump(self, remote: _Peer, sending: _Sending) -> None:
        """Post as many pieces as the window allows; settle when nothing is left to do."""
        worker = self._require_worker()
        total, size = len(sending.data), self.options.chunk_bytes
        while (
            sending.stopped is None
            and sending.data_tag is not None
            and sending.next_byte < total
            and sending.under_way < self.options.window
        ):
            piece = sending.data[sending.next_byte : sending.next_byte + size]
            sending.next_byte += len(piece)
            sending.pieces += 1
            sending.under_way += 1
            worker.send(remote.endpoint, sending.data_tag, piece, self._piece_sent(remote, sending))
        if sending.under_way == 0 and (sending.stopped or sending.next_byte == total):
            self._settle(remote, sending)

    def _piece_sent(self, remote: _Peer, sending: _Sending) -> Callable[[Exception | None], None]:
        def done(error: Exception | None) -> None:
            sending.under_way -= 1
            if error is not None:
                sending.stopped = sending.stopped or PeerLost(f"the peer went away: {error}")
                self._lose(remote, str(error))
            self._pump(remote, sending)

        return done

    def _settle(self, remote: _Peer, sending: _Sending) -> None:
        remote.sends.pop(sending.number, None)
        if sending.outcome.done():
            return
        if sending.next_byte == len(sending.data) and not isinstance(sending.stopped, PeerLost):
            sending.outcome.set_result(None)
            return
        error = remote.lost or sending.stopped or TransferCancelled("the send was stopped")
        if remote.lost is None:
            self._say(remote, _Kind.ABANDON, sending.number, sending.pieces)
        sending.outcome.set_exception(error)

    # -- receiving

    def receive(self, tag: int, buffer: Buffer) -> Receive:
        if self._worker is None or self._closing or self._loop is None:
            raise TransferCancelled("the transport is closed")
        receive = PendingReceive(
            tag,
            writable_bytes(buffer),
            self._loop,
            withdraw=self._withdraw,
            interrupt=self._interrupt,
        )
        announced = self._mailbox.post(receive)
        if announced is not None:
            self._take(announced, receive)
        return receive

    def _withdraw(self, receive: PendingReceive) -> None:
        self._mailbox.withdraw(receive)
        self.stats.cancelled += 1

    async def _interrupt(self, receive: PendingReceive) -> None:
        """Stop a message that is being written, and wait until it is."""
        self.stats.cancelled += 1
        for remote in [*self._peers.values(), *self._lost]:
            for number, incoming in remote.incoming.items():
                if incoming.receive is receive:
                    if remote.lost is None:
                        self._say(remote, _Kind.STOP, number)
                    await self._confirm_receive(receive, remote)
                    return
        await receive.settled()

    async def _confirm_receive(self, receive: PendingReceive, remote: _Peer) -> None:
        loop = asyncio.get_running_loop()
        grace = loop.call_later(
            self.options.cancel_grace_s, self._lose, remote, "it does not react to a cancel"
        )
        try:
            await receive.settled()
        finally:
            grace.cancel()

    def end(self, tag: int) -> None:
        for announced in self._mailbox.end(tag):
            self._refuse_late(announced)

    def _refuse_late(self, announced: _Announced) -> None:
        self.stats.late += 1
        if announced.peer.lost is None:
            self._refuse(announced, "refused: the transfer is over")

    def _arrived(self, announced: _Announced) -> None:
        """A message was announced: match it, keep it, or turn it away."""
        if announced.tag in self._mailbox.over:
            self._refuse_late(announced)
            return
        if self._mailbox.full and announced.tag not in self._mailbox.posted:
            self.stats.refused += 1
            limit = self._mailbox.max_waiting
            reason = f"refused: {limit} messages without a receive wait already"
            logger.warning("message %s", reason)
            self._refuse(announced, reason)
            return
        receive = self._mailbox.arrive(announced)
        if receive is not None:
            self._take(announced, receive)

    def _refuse(self, announced: _Announced, reason: str) -> None:
        self._say(announced.peer, _Kind.REFUSE, announced.number, payload=reason.encode())

    def _take(self, announced: _Announced, receive: PendingReceive) -> None:
        """Let a matched message into its buffer."""
        if announced.nbytes > len(receive.view):
            text = f"a message of {announced.nbytes} bytes for a buffer of {len(receive.view)}"
            receive.fail(Truncated(text))
            if announced.payload is None:
                self._refuse(announced, f"the receiver refused {text}")
        elif announced.payload is not None:
            receive.view[: announced.nbytes] = announced.payload
            self._received(receive, announced.nbytes)
        else:
            self._take_pieces(announced, receive)

    def _take_pieces(self, announced: _Announced, receive: PendingReceive) -> None:
        worker, size = self._require_worker(), announced.piece
        data_tag = secrets.randbits(64)
        starts = range(0, announced.nbytes, size)
        incoming = _Incoming(announced, receive, [], len(starts))
        announced.peer.incoming[announced.number] = incoming
        for start in starts:
            piece = receive.view[start : min(start + size, announced.nbytes)]
            incoming.ops.append(worker.receive(data_tag, piece, self._piece_received(incoming)))
        self._say(announced.peer, _Kind.READY, announced.number, data_tag)

    def _piece_received(self, incoming: _Incoming) -> Callable[[Exception | None], None]:
        def done(error: Exception | None) -> None:
            incoming.left -= 1
            incoming.error = incoming.error or error
            if error is not None and incoming.sent is None:
                self._lose(incoming.announced.peer, str(error))
            if incoming.left == 0:
                self._complete(incoming)

        return done

    def _complete(self, incoming: _Incoming) -> None:
        """UCX has let go of the buffer: say what became of the message."""
        remote, receive = incoming.announced.peer, incoming.receive
        remote.incoming.pop(incoming.announced.number, None)
        if remote.lost is not None and not remote.incoming:
            self._lost.discard(remote)
        if incoming.error is None:
            self._received(receive, incoming.announced.nbytes)
        elif receive.cancelling:
            receive.fail(TransferCancelled(f"receive {receive.tag:#x} was cancelled half-way"))
        elif remote.lost is not None:
            receive.fail(remote.lost)
        elif incoming.sent == 0 and not self._closing:
            # Taken back before a byte moved: as if it had never been announced.
            announced = self._mailbox.repost(receive)
            if announced is not None:
                self._take(announced, receive)
        else:
            receive.fail(TransferCancelled("the sender cancelled half-way"))

    def _received(self, receive: PendingReceive, nbytes: int) -> None:
        self.stats.messages_received += 1
        self.stats.bytes_received += nbytes
        receive.finish(nbytes)

    # -- peers

    def _reach(self, address: bytes) -> _Peer:
        """The peer at an address, connected anew if need be."""
        if self._worker is None or self._closing:
            raise TransferCancelled("the transport is closed")
        if len(address) <= _ADDRESS.size or not address.startswith(_ADDRESS_MAGIC):
            raise PeerLost(f"not the address of a ucx:// transport: {address[:8]!r}...")
        _, ident, control_tag = _ADDRESS.unpack_from(address)
        if ident == self._ident:
            raise ValueError("a transport does not send to itself")
        if ident in self._peers:
            return self._peers[ident]
        endpoint = self._connect(ident, address[_ADDRESS.size :])
        remote = _Peer(ident, address, control_tag, endpoint)
        self._peers[ident] = remote
        self._say(remote, _Kind.HELLO, value=next(self._numbers), payload=self._address)
        asyncio.get_running_loop().call_later(
            self.options.connect_timeout_s, self._check_welcome, remote
        )
        return remote

    def _connect(self, ident: int, address: bytes) -> Endpoint:
        """A new endpoint. What was out of reach is not tried again at once: UCX 1.21 keeps the socket of
        every TCP connection that is refused as it is made (one to a dead process of this host), for good.
        """
        now = time.monotonic()
        last = self._out_of_reach.get(ident)
        if last is not None and now - last < _OUT_OF_REACH_S:
            raise PeerLost(f"UCX could not reach the peer {now - last:.1f} s ago")
        try:
            endpoint = self._require_worker().connect(address)
        except PeerLost:
            recent = ((i, t) for i, t in self._out_of_reach.items() if now - t < _OUT_OF_REACH_S)
            self._out_of_reach = dict(recent) | {ident: now}
            raise
        self._out_of_reach.pop(ident, None)
        return endpoint

    def _check_welcome(self, remote: _Peer) -> None:
        if not remote.welcomed and remote.lost is None:
            self._lose(remote, f"no answer in {self.options.connect_timeout_s:g} s")

    def _check_peers(self) -> None:
        for remote in list(self._peers.values()):
            if not remote.endpoint.alive:
                self._lose(remote, "connection reset")

    def _welcomed(self, remote: _Peer) -> None:
        """The peer has an endpoint to us: what was to be said to it can go."""
        remote.welcomed = True
        remote.met.set()
        waiting, remote.outbox = remote.outbox, []
        for view, done in waiting:
            if remote.lost is None:
                self._require_worker().send(remote.endpoint, remote.control_tag, view, done)
            else:
                done(remote.lost)

    def _lose(self, remote: _Peer, reason: str) -> None:
        """Drop a peer: everything under way with it ends, as soon as UCX has let go of it."""
        if remote.lost is not None:
            return
        remote.lost = PeerLost(f"the peer is lost: {reason}")
        self._peers.pop(remote.ident, None)
        self.stats.peers_lost += 1
        self._mailbox.discard(lambda a: a.peer is remote and a.payload is None)
        if remote.incoming:
            self._lost.add(remote)
        self._require_worker().disconnect(remote.endpoint)
        for incoming in list(remote.incoming.values()):
            for op in incoming.ops:
                op.cancel()
        for sending in list(remote.sends.values()):
            sending.stopped = sending.stopped or remote.lost
            self._pump(remote, sending)
        for flush in remote.flushes.values():
            if not flush.done():
                flush.set_result(None)
        remote.met.set()
        waiting, remote.outbox = remote.outbox, []
        for _view, done in waiting:
            done(remote.lost)
        self._require_worker().kick()

    # -- control messages

    def _say(
        self,
        remote: _Peer,
        kind: _Kind,
        number: int = 0,
        value: int = 0,
        *,
        extra: int = 0,
        payload: bytes = b"",
        on_done: Callable[[Exception | None], None] | None = None,
    ) -> None:
        head = _CONTROL.pack(_MAGIC, kind, len(payload), self._ident, number, value, extra)
        if remote.lost is not None:
            return

        def done(error: Exception | None) -> None:
            if error is not None:
                self._lose(remote, str(error))
            if on_done is not None:
                on_done(error)

        view = memoryview(head + payload)
        if kind == _Kind.HELLO:
            view = memoryview(bytes(view).ljust(_HELLO_BYTES, b"\0"))
            tag = _hello_tag(remote.control_tag)
            self._require_worker().send(remote.endpoint, tag, view, done)
        elif remote.welcomed:
            self._require_worker().send(remote.endpoint, remote.control_tag, view, done)
        else:
            remote.outbox.append((view, done))

    async def _say_and_wait(
        self, remote: _Peer, kind: _Kind, *, value: int, payload: bytes
    ) -> None:
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: Exception | None) -> None:
            if sent.done():
                return
            if error is None:
                sent.set_result(None)
            else:
                sent.set_exception(PeerLost(f"the peer went away: {error}"))

        self._say(remote, kind, next(self._numbers), value, payload=payload, on_done=done)
        await sent

    def _post_control(self, view: memoryview, tag: int) -> None:
        def done(error: Exception | None) -> None:
            try:
                if error is None:
                    self._on_control(view)
            finally:
                # With an error: cancelled by close, or a HELLO whose sender died while it was moved.
                if not self._closing or (self._peers and error is None):
                    self._post_control(view, tag)

        self._require_worker().receive(tag, view, done)

    def _on_control(self, view: memoryview) -> None:
        magic, kind, size, ident, number, value, extra = _CONTROL.unpack_from(view)
        if magic != _MAGIC or kind not in _KINDS or size > len(view) - _CONTROL.size:
            logger.warning("a control message that is none of ours was ignored")
            return
        payload = bytes(view[_CONTROL.size : _CONTROL.size + size])
        if kind == _Kind.HELLO:
            self._on_hello(ident, value, payload)
            return
        remote = self._peers.get(ident)
        if remote is None:
            # Sent before it noticed that we dropped the connection; it will be told of that.
            logger.debug("a control message of an unknown peer was ignored")
            return
        self._welcomed(remote)
        self._dispatch(remote, _Control(_Kind(kind), number, value, extra, payload))

    def _dispatch(self, remote: _Peer, said: _Control) -> None:
        kind, number, value, extra, payload = said
        sending, incoming = remote.sends.get(number), remote.incoming.get(number)
        match kind:
            case _Kind.INLINE:
                self._arrived(_Announced(value, len(payload), remote, number, payload=payload))
            case _Kind.ANNOUNCE:
                piece = int.from_bytes(payload, "little")
                if piece > 0 and extra > 0:
                    self._arrived(_Announced(value, extra, remote, number, piece))
            case _Kind.WELCOME:
                self._on_welcome(remote)
            case _Kind.READY if sending is not None:
                sending.data_tag = value
                self._pump(remote, sending)
            case _Kind.ABANDON if incoming is not None:
                self._on_abandon(incoming, value)
            case _Kind.ABANDON:
                self._mailbox.discard(lambda a: a.peer is remote and a.number == number)
            case _Kind.STOP | _Kind.REFUSE if sending is not None:
                reason = payload.decode(errors="replace") or "the receiver cancelled"
                sending.stopped = sending.stopped or TransferCancelled(reason)
                self._pump(remote, sending)
            case _Kind.STOP:
                self._say(remote, _Kind.ABANDON, number, _ALL_SENT)
            case _Kind.FLUSH:
                self._say(remote, _Kind.FLUSHED, number)
            case _Kind.FLUSHED if number in remote.flushes:
                flush = remote.flushes.pop(number)
                if not flush.done():
                    flush.set_result(None)
            case _:
                pass  # an answer to something that has ended meanwhile

    def _on_abandon(self, incoming: _Incoming, sent: int) -> None:
        if incoming.sent is None:
            incoming.sent = sent
            for op in incoming.ops[sent:]:
                op.cancel()

    def _on_hello(self, ident: int, number: int, address: bytes) -> None:
        remote = self._peers.get(ident)
        if remote is not None and remote.their_number not in (None, number):
            self._lose(remote, "it has started over")
            remote = None
        if remote is None:
            if self._closing:
                return
            try:
                remote = self._reach(address)
            except (PeerLost, ValueError) as error:
                logger.warning("a peer can't be reached back: %s", error)
                return
        remote.their_number = number
        self._welcomed(remote)
        self._say(remote, _Kind.WELCOME)

    # -- the end

    async def close(self) -> None:
        if self._worker is None or self._closing:
            return
        self._closing = True
        for receive in self._mailbox.drain():
            receive.fail(TransferCancelled("the transport was closed"))
        peers = list(self._peers.values())
        for remote in peers:
            for sending in list(remote.sends.values()):
                if sending.data_tag is None:
                    sending.stopped = TransferCancelled("the transport was closed")
                    self._pump(remote, sending)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.options.flush_timeout_s):
                await self._drain(peers)
        await self.abort()

    async def _drain(self, peers: list[_Peer]) -> None:
        """Wait for what is under way, then for every peer's word that all of it arrived."""
        for remote in peers:
            if remote.outbox:
                await remote.met.wait()
            for incoming in list(remote.incoming.values()):
                await incoming.receive.settled()
            for sending in list(remote.sends.values()):
                await asyncio.wait({sending.outcome})
        flushes = [self._flush(remote) for remote in peers if remote.welcomed and not remote.lost]
        if flushes:
            await asyncio.wait(flushes)

    def _flush(self, remote: _Peer) -> "asyncio.Future[None]":
        number = next(self._numbers)
        flush = asyncio.get_running_loop().create_future()
        remote.flushes[number] = flush
        self._say(remote, _Kind.FLUSH, number)
        return flush

    async def abort(self) -> None:
        self._closing = True
        if self._worker is None:
            return
        for receive in self._mailbox.drain():
            receive.fail(TransferCancelled("the transport was closed"))
        for remote in list(self._peers.values()):
            remote.lanes = ""
            self._lose(remote, "the transport was closed")
        self._drop_worker()

    def _drop_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self._lost.clear()

    def _require_worker(self) -> UcxWorker:
        if self._worker is None:
            raise TransferCancelled("the transport is closed")
        return self._worker

    def check_integrity(self) -> None:
        self._mailbox.check_integrity()


_KINDS = frozenset(_Kind)


def _hello_tag(control_tag: int) -> int:
    """Where a transport with this control tag takes a HELLO."""
    return control_tag ^ 1
