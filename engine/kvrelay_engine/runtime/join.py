"""The worker's end of `Fleet.Join`: dial, say hello, report, obey; dial again when the stream breaks."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc as rpc
from kvrelay_protocol.errors import StartupError, WireError, error_from_wire
from kvrelay_protocol.outgoing import Outgoing, each

log = logging.getLogger(__name__)

KEEPALIVE_MS = 1000
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
ALONE_S = 5.0
"""Without a router for this long: say so."""
REDIAL_S = 0.2
MAX_QUEUED = 65536
"""Messages waiting for the router; a router that falls this far behind is treated as lost."""
_CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class JoinHandler(Protocol):
    """What a worker does with the stream. Called on the event loop's thread."""

    def hello(self) -> pb.Hello:
        """Who this worker is, at this moment."""

    def heartbeat(self) -> pb.Load: ...

    def handle(self, message: pb.RouterMessage) -> None:
        """One message from the router; must not block."""

    def disconnected(self) -> None:
        """The router is gone, and with it every owner: drop all sequences and leases."""


class JoinLink:
    """Keeps one worker joined to one router. `send` never blocks; what can't be delivered is dropped
    with the stream, since the router has then given up everything this worker ran.
    """

    def __init__(self, router: str, handler: JoinHandler, *, heartbeat_s: float) -> None:
        self._router = router
        self._handler = handler
        self._heartbeat_s = heartbeat_s
        self._outgoing: Outgoing[pb.WorkerMessage] | None = None
        """What the session in progress has still to say."""
        self._patience = asyncio.timeout(None)
        """Of the session in progress; set to now, it ends the session."""
        self._leaving = False
        self.joined = asyncio.Event()

    def send(self, message: pb.WorkerMessage) -> None:
        """Queue a message in order; dropped when no router is connected."""
        if self._outgoing is not None and not self._outgoing.put(message):
            self._outgoing = None
            self._patience.reschedule(asyncio.get_running_loop().time())

    def leave(self) -> None:
        """Say what is queued, then close the stream from this side: `run` returns when the router
        has read it all, or at once when there is no router.
        """
        self._leaving = True
        if self._outgoing is not None:
            self._outgoing.close()
            self._outgoing = None

    async def run(self, on_joined: Callable[[], None]) -> None:
        """Stay joined until cancelled, or until `leave`.

        Raises:
            StartupError: the router refused this worker; the message names what does not fit.
        """
        loop = asyncio.get_running_loop()
        alone_since, reported = loop.time(), False
        while not self._leaving:
            why = "it closed the stream"
            try:
                await self._session(on_joined)
            except grpc.aio.AioRpcError as error:
                why = error.code().name
            except TimeoutError:
                why = "it does not read its messages"
                log.error("the router at %s does not read; treating it as lost", self._router)
            if self.joined.is_set():
                self.joined.clear()
                alone_since, reported = loop.time(), False
                self._handler.disconnected()
            # A router that restarts is back within seconds, and on shutdown it goes first.
            if not reported and loop.time() - alone_since > ALONE_S:
                log.warning("no router at %s (%s); still dialling", self._router, why)
                reported = True
            await asyncio.sleep(REDIAL_S)

    async def _session(self, on_joined: Callable[[], None]) -> None:
        self._patience = asyncio.timeout(None)
        async with (
            self._patience,
            grpc.aio.insecure_channel(self._router, options=_CHANNEL_OPTIONS) as channel,
        ):
            outgoing = self._outgoing = Outgoing(pb.WorkerMessage, MAX_QUEUED)
            hello = pb.WorkerMessage(hello=self._handler.hello())
            call = rpc.FleetStub(channel).Join(_said(hello, outgoing))
            heartbeat = asyncio.create_task(self._heartbeats())
            try:
                async for message in call:
                    each(message, lambda part: self._receive(part, on_joined))
            finally:
                self._outgoing = None
                heartbeat.cancel()
                call.cancel()

    def _receive(self, message: pb.RouterMessage, on_joined: Callable[[], None]) -> None:
        match message.WhichOneof("message"):
            case "welcome":
                self._heartbeat_s = message.welcome.heartbeat_seconds or self._heartbeat_s
                self.joined.set()
                on_joined()
            case "refused":
                error = message.refused.error
                reason = error_from_wire(WireError(error.code, error.message))
                raise StartupError(f"the router at {self._router} refused: {reason.message}")
            case _:
                self._handler.handle(message)

    async def _heartbeats(self) -> None:
        await self.joined.wait()  # the welcome says how often
        while True:
            await asyncio.sleep(self._heartbeat_s)
            self.send(pb.WorkerMessage(heartbeat=pb.Heartbeat(load=self._handler.heartbeat())))


async def _said(
    hello: pb.WorkerMessage, outgoing: Outgoing[pb.WorkerMessage]
) -> AsyncIterator[pb.WorkerMessage]:
    """A session from this side. The hello goes alone: it says in which version the rest is meant."""
    yield hello
    while (message := await outgoing.next()) is not None:
        yield message
