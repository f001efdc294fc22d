"""The worker's end of `Fleet.Join`: dial, say hello, report, obey; dial again when the stream breaks."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import grpc

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc as rpc
from kvrelay_protocol.errors import StartupError, WireError, error_from_wire
from kvrelay_protocol.incoming import Incoming, MessageMissing
from kvrelay_protocol.outgoing import Outgoing

log = logging.getLogger(__name__)

KEEPALIVE_MS = 1000
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
ALONE_S = 5.0
"""Without a router for this long: say so."""
REDIAL_S = 0.2
"""From one attempt's begin to the next."""
MAX_QUEUED = 65536
"""Messages waiting for the router; a router that falls this far behind is treated as lost."""
MIN_SILENCE_S = 3.0
"""A busy machine may delay a pulse; below this silence is not a sign of anything."""
MISSED_PULSES = 3
_WATCH_S = 0.25
_Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.WorkerMessage, pb.RouterMessage]"
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Each session dials for itself: what gRPC remembers of failed tries would hold the next one back.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(slots=True)
class JoinFaults:
    """What a worker noticed of its routers' streams, since its start."""

    repeated: int = 0
    missing: int = 0
    silent: int = 0


@dataclass(frozen=True, slots=True)
class JoinTls:
    """How to dial a router whose port speaks TLS."""

    credentials: grpc.ChannelCredentials
    name: str = ""
    """In the router's certificate, where it is not the host that is dialled."""


class JoinHandler(Protocol):
    """What a worker does with its streams. Called on the event loop's thread.

    A session is one joined stream, by a number that is never used again.
    """

    def hello(self) -> pb.Hello:
        """Who this worker is, at this moment."""

    def heartbeat(self, session: int) -> pb.Heartbeat: ...

    def handle(self, message: pb.RouterMessage, session: int) -> None:
        """One message from the session's router; must not block."""

    def disconnected(self, session: int) -> None:
        """The router is gone, and with it the owner of the session's sequences and leases."""


class _Refusal(Exception):
    """The router does not take this worker."""


class _Lost(Exception):
    """This side gives the session up."""


class JoinLink:
    """Keeps one worker joined to one router. `send` never blocks; what can't be delivered is dropped
    with the stream, since the router has then given up everything this worker ran.
    """

    def __init__(
        self,
        router: str,
        handler: JoinHandler,
        *,
        heartbeat_s: float,
        sessions: Iterator[int] | None = None,
        tls: JoinTls | None = None,
        faults: JoinFaults | None = None,
    ) -> None:
        """Args: `sessions` gives numbers that no other link of this worker uses; default from 0."""
        self.router = router
        self.session = -1
        """Number of the session in progress, or of the last one."""
        self.faults = faults or JoinFaults()
        self.joined = asyncio.Event()
        self._handler = handler
        self._heartbeat_s = heartbeat_s
        self._sessions = itertools.count() if sessions is None else sessions
        self._tls = tls
        self._outgoing: Outgoing[pb.WorkerMessage] | None = None
        """What the session in progress has still to say."""
        self._given_up: asyncio.Future[None] | None = None
        """Of the session in progress: why this side ends it."""
        self._heard_at = 0.0
        self._leaving = False

    def send(self, message: pb.WorkerMessage) -> None:
        """Queue a message in order; dropped when no router is connected."""
        if self._outgoing is not None and not self._outgoing.put(message):
            self._outgoing = None
            log.error("the router at %s does not read; treating it as lost", self.router)
            self._give_up("it does not read its messages")

    def leave(self) -> None:
        """Say what is queued, then close the stream from this side: `run` returns when the router
        has read it all, or at once when there is no router.
        """
        self._leaving = True
        if self._outgoing is not None:
            self._outgoing.close()
            self._outgoing = None

    @property
    def silence_limit_s(self) -> float:
        return max(MIN_SILENCE_S, MISSED_PULSES * self._heartbeat_s)

    async def run(self, on_joined: Callable[[], None]) -> None:
        """Stay joined until cancelled, or until `leave`.

        Raises:
            StartupError: the router refused this worker; the message names what does not fit.
        """
        loop = asyncio.get_running_loop()
        alone_since, reported = loop.time(), False
        while not self._leaving:
            began = loop.time()
            why = await self._one_session(on_joined)
            if self.joined.is_set():
                self.joined.clear()
                alone_since, reported = loop.time(), False
                self._handler.disconnected(self.session)
            # A router that restarts is back within seconds, and on shutdown it goes first.
            if not reported and loop.time() - alone_since > ALONE_S:
                log.warning("no router at %s (%s); still dialling", self.router, why)
                reported = True
            if not self._leaving:
                await asyncio.sleep(max(0.0, began + REDIAL_S - loop.time()))

    async def _one_session(self, on_joined: Callable[[], None]) -> str:
        """Returns why it ended."""
        try:
            await self._session(on_joined)
        except _Refusal as refusal:
            raise StartupError(f"the router at {self.router} refused: {refusal}") from None
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.ABORTED:
                log.warning("given up by the router at %s: %s", self.router, error.details())
            return f"{error.code().name}: {error.details() or ''}"
        except (_Lost, MessageMissing) as lost:
            why = str(lost)  # and not the error, whose frames refer to the connection
            if self.joined.is_set():
                log.warning("lost the router at %s: %s", self.router, why)
            return why
        return "it closed the stream"

    def _channel(self) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self.router, options=_CHANNEL_OPTIONS)
        name = self._tls.name
        options = (*_CHANNEL_OPTIONS, *((("grpc.ssl_target_name_override", name),) if name else ()))
        return grpc.aio.secure_channel(self.router, self._tls.credentials, options=options)

    async def _session(self, on_joined: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self.session = next(self._sessions)
        self._heard_at = loop.time()
        given_up = self._given_up = loop.create_future()
        async with self._channel() as channel:
            outgoing = self._outgoing = Outgoing(pb.WorkerMessage, MAX_QUEUED)
            hello = pb.WorkerMessage(hello=self._handler.hello())
            call = rpc.FleetStub(channel).Join()
            reading = asyncio.ensure_future(self._read(call, on_joined))
            aside = (
                asyncio.ensure_future(_write(call, hello, outgoing)),
                asyncio.ensure_future(self._heartbeats()),
                asyncio.ensure_future(self._watch()),
            )
            try:
                ends: set[asyncio.Future[None]] = {reading, given_up}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                (given_up if given_up.done() else reading).result()
            finally:
                self._outgoing = None
                given_up.cancel()
                for task in (reading, *aside):
                    task.cancel()
                call.cancel()
                await asyncio.gather(reading, *aside, return_exceptions=True)
                # What ended the session refers to this frame: it must not keep call and connection alive.
                del reading, given_up, ends, aside, call, task
                self._given_up = None

    async def _read(self, call: _Call, on_joined: Callable[[], None]) -> None:
        loop, incoming = asyncio.get_running_loop(), Incoming[pb.RouterMessage]()
        # Not `async for`: a call and the iterator it makes for that keep each other alive.
        while isinstance(message := await call.read(), pb.RouterMessage):
            self._heard_at = loop.time()
            if not self.joined.is_set():
                self._answered(message, on_joined)
                continue
            try:
                if not incoming.take(message, self._obey):
                    self.faults.repeated += 1
            except MessageMissing:
                self.faults.missing += 1
                raise

    def _obey(self, message: pb.RouterMessage) -> None:
        self._handler.handle(message, self.session)

    def _answered(self, message: pb.RouterMessage, on_joined: Callable[[], None]) -> None:
        """The router's first message: the only one without a number."""
        match message.WhichOneof("message"):
            case "welcome":
                self._heartbeat_s = message.welcome.heartbeat_seconds or self._heartbeat_s
                self.joined.set()
                on_joined()
            case "refused":
                error = message.refused.error
                raise _Refusal(error_from_wire(WireError(error.code, error.message)).message)
            case other:
                raise _Lost(f"its first message was {other}")

    def _give_up(self, why: str) -> None:
        if self._given_up is not None and not self._given_up.done():
            self._given_up.set_exception(_Lost(why))

    async def _heartbeats(self) -> None:
        await self.joined.wait()  # the welcome says how often
        while True:
            await asyncio.sleep(self._heartbeat_s)
            self.send(pb.WorkerMessage(heartbeat=self._handler.heartbeat(self.session)))

    async def _watch(self) -> None:
        """Give a router up that fell silent: a stopped process keeps its connection."""
        loop = asyncio.get_running_loop()
        checked_at = loop.time()
        while True:
            await asyncio.sleep(_WATCH_S)
            now = loop.time()
            pause, checked_at = now - checked_at, now
            if pause > self.silence_limit_s / 2:
                self._heard_at = now  # it was this process that slept: what came is still unread
            elif now - self._heard_at > self.silence_limit_s:
                self.faults.silent += 1
                self._give_up(f"no sign of life for {now - self._heard_at:.1f} s")


async def _write(
    call: _Call, hello: pb.WorkerMessage, outgoing: Outgoing[pb.WorkerMessage]
) -> None:
    """A session from this side. The hello goes alone: it says in which version the rest is meant.

    A task of our own: gRPC's, which it makes of an iterator, outlives a call that fails by itself.
    """
    await call.write(hello)
    while (message := await outgoing.next()) is not None:
        await call.write(message)
    await call.done_writing()
