"""A gRPC proxy for one worker's Join stream to one router, which loses, repeats and holds up messages.

```
worker ──► JoinProxy ──► router      lanes: "up" and "down", each with the faults armed for it
       ◄──           ◄──
```

It hands on bytes. A message is parsed only to find one of the kind that an armed fault waits for.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import grpc
import grpc.aio

from kvrelay_chaos.armed import Armed, Waiting
from kvrelay_infra.host import free_port
from kvrelay_protocol import fleet_pb2 as pb

Direction: TypeAlias = Literal["up", "down"]
MessageFault: TypeAlias = Literal["delay", "drop", "duplicate", "reorder"]
_Call: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"
ANY = "any"
_HOST = "127.0.0.1"
_METHOD = "/kvrelay.fleet.v1.Fleet/Join"
_MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# What router and workers ask of each other; in between, neither may notice a difference.
_SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 300),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True, slots=True)
class MessageOrder:
    """What is to happen to one written message."""

    fault: MessageFault
    message: str = ANY
    """The kind it waits for, by its name in fleet.proto: alone, or in a batch."""
    seconds: float = 0.0
    """Of a delay."""


class Lane:
    """One direction of a stream. Orders outlive the stream: the next one takes what is left."""

    def __init__(self, direction: Direction) -> None:
        self._parse: type[pb.WorkerMessage | pb.RouterMessage] = (
            pb.WorkerMessage if direction == "up" else pb.RouterMessage
        )
        self.orders: Waiting[MessageOrder] = Waiting()
        self.messages = 0
        """Written messages that came this way."""
        self.open = asyncio.Event()
        """Cleared while the stream is frozen."""
        self.open.set()

    async def through(self, source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """What comes out of the lane for what goes in."""
        held: bytes | None = None
        async for message in source:
            self.messages += 1
            armed = self._take(message)
            if armed is not None and armed.order.fault == "reorder" and held is None:
                held = message
                armed.fire()
                continue
            for written in await self._faulted(message, armed):
                await self.open.wait()
                yield written
            if held is not None:
                yield held
                held = None

    async def _faulted(self, message: bytes, armed: Armed[MessageOrder] | None) -> list[bytes]:
        if armed is None:
            return [message]
        armed.fire()
        match armed.order.fault:
            case "drop":
                return []
            case "duplicate":
                return [message, message]
            case "delay":
                await asyncio.sleep(armed.order.seconds)
                return [message]
            case "reorder":  # one is held already: this is the one that overtakes it
                return [message]

    def _take(self, message: bytes) -> Armed[MessageOrder] | None:
        if not self.orders:
            return None
        kinds = {ANY, *kinds_of(self._parse.FromString(message))}
        return self.orders.take(lambda order: order.message in kinds)


def kinds_of(message: pb.WorkerMessage | pb.RouterMessage) -> list[str]:
    """Names of what is in a written message."""
    kind = message.WhichOneof("message")
    if kind == "batch":
        return [name for part in message.batch.messages for name in kinds_of(part)]
    return [kind] if kind else []


@dataclass(eq=False, slots=True)
class _Session:
    """One call that is open now."""

    welcomed: bool = False
    cut: asyncio.Event = field(default_factory=asyncio.Event)


class JoinProxy:
    """Listens for one worker and dials one router for it."""

    def __init__(self, router: str, port: int = 0) -> None:
        """Args: `router` is the join address behind the proxy; `port` 0 takes a free one."""
        self.port = port or free_port(_HOST)
        self.lanes: dict[Direction, Lane] = {"up": Lane("up"), "down": Lane("down")}
        self._router = router
        self._server: grpc.aio.Server | None = None
        self._session: _Session | None = None

    @property
    def address(self) -> str:
        return f"{_HOST}:{self.port}"

    @property
    def connected(self) -> bool:
        """The worker's stream is open, and the router has answered on it."""
        return self._session is not None and self._session.welcomed

    async def start(self) -> None:
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._join)
        service, _, method = _METHOD.removeprefix("/").partition("/")
        generic = grpc.method_handlers_generic_handler(service, {method: handler})
        self._server.add_generic_rpc_handlers((generic,))
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    def cut(self) -> bool:
        """Break the stream at once. Returns whether there was one."""
        if self._session is None:
            return False
        self._session.cut.set()
        return True

    async def freeze(self, seconds: float) -> bool:
        """Let nothing through either way for a while. Returns whether a stream was open."""
        hit = self.connected
        for lane in self.lanes.values():
            lane.open.clear()
        try:
            await asyncio.sleep(seconds)
        finally:
            for lane in self.lanes.values():
                lane.open.set()
        return hit

    async def _join(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        session = self._session = _Session()
        try:
            async with grpc.aio.insecure_channel(self._router, options=_CHANNEL_OPTIONS) as channel:
                join: Any = channel.stream_stream(
                    _METHOD, request_serializer=None, response_deserializer=None
                )
                call: _Call = join()
                writing = asyncio.create_task(_write(call, self.lanes["up"].through(requests)))
                try:
                    async for message in self.lanes["down"].through(_read(call, session.cut)):
                        session.welcomed = True
                        yield message
                finally:
                    writing.cancel()
                    call.cancel()
                    # What ends a session refers to this frame: it must not keep the connection alive.
                    del call, writing
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")
        finally:
            if self._session is session:
                self._session = None
        if session.cut.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the stream was cut")


async def _write(call: _Call, messages: AsyncIterator[bytes]) -> None:
    # A call that has ended says so to its reader.
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        async for message in messages:
            await call.write(message)
        await call.done_writing()


async def _read(call: _Call, cut: asyncio.Event) -> AsyncIterator[bytes]:
    """What the router says, until `cut` is set."""
    stopped = asyncio.create_task(cut.wait())
    following: asyncio.Future[Any] | None = None
    try:
        while True:
            # Not `async for`: a call and the iterator it makes for that keep each other alive.
            following = asyncio.ensure_future(call.read())
            await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                return
            message = following.result()
            if not isinstance(message, bytes):
                return
            yield message
    finally:
        stopped.cancel()
        if following is not None:
            following.cancel()
        following = None  # as above
