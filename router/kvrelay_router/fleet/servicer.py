"""The gRPC end of the Join stream: bytes in, registry calls; queued messages, bytes out."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc
import grpc.aio

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc
from kvrelay_protocol.errors import KvrelayError, PortInUse, UsageError, error_to_wire
from kvrelay_protocol.tls import read_tls
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.fleet.weight_peers import WeightPeers
from kvrelay_router.fleet.worker_link import WorkerLink

HELLO_TIMEOUT_S = 5.0
SWEEP_S = 0.1
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # The failure detector for a host that vanishes; a killed process closes its socket by itself.
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Workers ping as often; without these two the server would answer with GOAWAY.
    ("grpc.http2.min_ping_interval_without_data_ms", 300),
    ("grpc.http2.max_ping_strikes", 0),
    # A port in use is an error, not a share of somebody else's connections.
    ("grpc.so_reuseport", 0),
)

logger = logging.getLogger(__name__)


class _Call(Protocol):
    """The part of grpc.aio's ServicerContext that is used here."""

    async def write(self, message: pb.RouterMessage) -> None: ...

    async def abort(self, code: grpc.StatusCode, details: str = "") -> Any: ...


class FleetServicer(fleet_pb2_grpc.FleetServicer):
    """One `Join` call per worker; one word about who has its weights. Owns nothing: links belong to the registry."""

    def __init__(self, registry: WorkerRegistry, *, router_id: str, heartbeat_s: float) -> None:
        self._registry = registry
        self._weights = WeightPeers(registry)
        self._welcome = pb.RouterMessage(
            welcome=pb.Welcome(router_id=router_id, heartbeat_seconds=heartbeat_s),
        )

    async def Join(self, requests: AsyncIterator[pb.WorkerMessage], context: _Call) -> None:  # noqa: N802 - the name in fleet.proto
        try:
            first = await asyncio.wait_for(_next(requests), HELLO_TIMEOUT_S)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello arrived")
            return
        if first is not None and first.WhichOneof("message") == "starting":
            await self._listen_to_start(first, requests, context)
            return
        if first is None or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be hello")
            return
        try:
            link = self._registry.join(first.hello)
        except KvrelayError as error:
            await context.write(_refused(error))
            return
        try:
            why = await self._serve(link, requests, context)
        finally:
            self._registry.lose(link, "its stream ended")
        if why is not None:
            await context.abort(grpc.StatusCode.ABORTED, why)

    async def FindWeights(self, wanted: pb.WeightsWanted, context: _Call) -> pb.WeightsFound:  # noqa: N802 - the name in fleet.proto
        del context
        try:
            return self._weights.find(wanted)
        except KvrelayError as error:
            logger.warning("worker %s may not ask for weights: %s", wanted.worker_name, error)
            return pb.WeightsFound(error=_wire_error(error))

    async def _listen_to_start(
        self, first: pb.WorkerMessage, requests: AsyncIterator[pb.WorkerMessage], context: _Call
    ) -> None:
        """A worker that can't take work yet, until it ends the call."""
        name, message = first.starting.worker_name, first
        try:
            # A message of another kind has no name here, and ends it too.
            while message.starting.worker_name == name:
                self._registry.starts(message.starting, context)
                following = await _next(requests)
                if following is None:
                    return
                message = following
        except KvrelayError as error:
            await context.write(_refused(error))
        finally:
            self._registry.starts_no_more(name, context)

    async def _serve(
        self,
        link: WorkerLink,
        requests: AsyncIterator[pb.WorkerMessage],
        context: _Call,
    ) -> str | None:
        """Run until the stream ends (None) or the registry gives the worker up (the reason)."""
        await context.write(self._welcome)
        tasks = (
            asyncio.create_task(self._read(link, requests), name=f"read {link.name}"),
            asyncio.create_task(_write(link, context), name=f"write {link.name}"),
        )
        try:
            ends: tuple[asyncio.Future[Any], ...] = (*tasks, link.lost)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return link.lost.result() if link.lost.done() else None

    async def _read(self, link: WorkerLink, requests: AsyncIterator[pb.WorkerMessage]) -> None:
        async for message in requests:
            self._registry.written(link, message)
            if link.lost.done():
                return


async def _next(requests: AsyncIterator[pb.WorkerMessage]) -> pb.WorkerMessage | None:
    async for message in requests:
        return message
    return None


async def _write(link: WorkerLink, context: _Call) -> None:
    while (message := await link.next_outgoing()) is not None:
        await context.write(message)


def _refused(error: KvrelayError) -> pb.RouterMessage:
    return pb.RouterMessage(refused=pb.Refused(error=_wire_error(error)))


def _wire_error(error: KvrelayError) -> pb.Error:
    wire = error_to_wire(error)
    return pb.Error(code=wire.code, message=wire.message)


class FleetServer:
    """The listening gRPC server and the sweep for silent workers."""

    def __init__(self, server: grpc.aio.Server, registry: WorkerRegistry, port: int) -> None:
        self.port = port
        self._server = server
        self._registry = registry
        self._sweeper = asyncio.create_task(self._sweep(), name="sweep for silent workers")

    async def stop(self, grace_s: float = 0.0) -> None:
        """Close every Join call, after at most `grace_s` for workers to leave by themselves."""
        self._registry.closing = True
        self._sweeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._sweeper
        await self._server.stop(grace_s)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._registry.sweep()


def join_credentials(config: RouterConfig) -> grpc.ServerCredentials | None:
    """What the port that workers dial shows and asks for; None for plain text.

    Raises:
        UsageError: the files can't be used, or an authority is given without a certificate.
    """
    flags = ("--join-tls-cert", "--join-tls-key", "--join-tls-ca")
    files = read_tls(config.join_tls_cert, config.join_tls_key, config.join_tls_ca, flags=flags)
    if files is None:
        return None
    if files.certificate is None or files.key is None:
        raise UsageError("--join-tls-ca needs --join-tls-cert: only a TLS port can ask for one")
    return grpc.ssl_server_credentials(
        [(files.key, files.certificate)],
        root_certificates=files.authority,
        require_client_auth=files.authority is not None,
    )


async def create_fleet_server(
    config: RouterConfig,
    registry: WorkerRegistry,
    *,
    router_id: str,
) -> FleetServer:
    """Bind, start, and return the server with its actual port.

    Raises:
        PortInUse: another process listens on `config.join_port`.
        UsageError: its TLS files can't be used.
    """
    credentials = join_credentials(config)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    servicer = FleetServicer(registry, router_id=router_id, heartbeat_s=config.heartbeat_s)
    fleet_pb2_grpc.add_FleetServicer_to_server(servicer, server)
    address = f"{config.join_host}:{config.join_port}"
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise PortInUse(f"can't listen for workers on {address}: is the port in use?") from error
    if port == 0:
        raise PortInUse(f"can't listen for workers on {address}: is the port in use?")
    await server.start()
    return FleetServer(server, registry, port)
