"""The gRPC service that a ScaledObject with a trigger of type `external-push` names.

KEDA owns the number of replicas and asks two things: whether a pool is *active* (0 ↔ 1, pushed over
`StreamIsActive` and polled) and the value of a metric (1 ↔ N, through the HPA that KEDA makes). The
metric is the target itself and one replica is worth 1 of it, so the HPA's `ceil(metric / 1)` is what
`decide` wants. A pool of which nothing is known is an error and not a zero: KEDA and the HPA hold then.

Protocol: https://keda.sh/docs/latest/concepts/external-scalers/
"""

from collections.abc import AsyncIterator, Mapping
from typing import NoReturn, Protocol

import grpc
import grpc.aio

from kvrelay_protocol import externalscaler_pb2 as pb
from kvrelay_protocol import externalscaler_pb2_grpc
from kvrelay_protocol.errors import PortInUse

POOLS = ("prefill", "decode")
_OPTIONS: tuple[tuple[str, int], ...] = (
    # A port in use is an error, not a share of somebody else's connections.
    ("grpc.so_reuseport", 0),
    # KEDA keeps one connection for hours and may ping it while no call is open.
    ("grpc.keepalive_permit_without_calls", 1),
    # A KEDA operator that vanished must not keep its streams here.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


class ScalingSource(Protocol):
    """What this router wants of the pools, read on its event loop."""

    def targets(self) -> Mapping[str, int]:
        """Workers wanted by pool, `prefill` and `decode`; one that is not known is left out."""

    def active(self, pool: str) -> bool:
        """Whether `pool` must not be at zero: something is parked, queued, streaming or in flight."""

    async def changed(self) -> None:
        """Return when an answer of `active` may have changed since the call.

        It must be listening before its first suspension: no change after a call of `active` in the
        same turn of the loop may be missed. Any number of tasks wait at once.
        """


class _Call(Protocol):
    """The part of grpc.aio's ServicerContext that is used here."""

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn: ...


def metric_name(pool: str) -> str:
    """The metric that KEDA puts into the HPA of `pool`."""
    return f"kvrelay-{pool}-replicas"


class ExternalScalerServicer(externalscaler_pb2_grpc.ExternalScalerServicer):
    """Answers for one model; every ScaledObject names its pool in `metadata.pool`.

    With several routers each answers for what it knows, and the HPA takes the largest (ADR 20).
    """

    def __init__(self, source: ScalingSource, *, model: str) -> None:
        self._source = source
        self._model = model

    async def IsActive(self, request: pb.ScaledObjectRef, context: _Call) -> pb.IsActiveResponse:  # noqa: N802 - KEDA's name
        pool = await self._pool(request, context)
        return pb.IsActiveResponse(result=self._source.active(pool))

    async def StreamIsActive(  # noqa: N802 - KEDA's name
        self, request: pb.ScaledObjectRef, context: _Call
    ) -> AsyncIterator[pb.IsActiveResponse]:
        pool = await self._pool(request, context)
        told: bool | None = None
        while True:
            active = self._source.active(pool)
            if active == told:
                await self._source.changed()
                continue
            told = active
            yield pb.IsActiveResponse(result=active)

    async def GetMetricSpec(  # noqa: N802 - KEDA's name
        self, request: pb.ScaledObjectRef, context: _Call
    ) -> pb.GetMetricSpecResponse:
        name = metric_name(await self._pool(request, context))
        spec = pb.MetricSpec(metricName=name, targetSize=1, targetSizeFloat=1.0)
        return pb.GetMetricSpecResponse(metricSpecs=[spec])

    async def GetMetrics(  # noqa: N802 - KEDA's name
        self, request: pb.GetMetricsRequest, context: _Call
    ) -> pb.GetMetricsResponse:
        pool = await self._pool(request.scaledObjectRef, context)
        name = metric_name(pool)
        if request.metricName != name:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"metric {request.metricName!r}: pool {pool} has {name!r} alone",
            )
        wanted = self._source.targets().get(pool)
        if wanted is None:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE,
                f"how many workers {pool} needs is not known yet: keep what is there",
            )
        value = pb.MetricValue(metricName=name, metricValue=wanted, metricValueFloat=float(wanted))
        return pb.GetMetricsResponse(metricValues=[value])

    async def _pool(self, ref: pb.ScaledObjectRef, context: _Call) -> str:
        """The pool that the trigger's metadata names; the call ends where it is not one of ours."""
        metadata = ref.scalerMetadata
        pool, model = metadata.get("pool", ""), metadata.get("model", "")
        where = f"ScaledObject {ref.namespace}/{ref.name}"
        if pool not in POOLS:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{where}: metadata.pool is {pool!r}, must be {' or '.join(POOLS)}",
            )
        if model and model != self._model:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"{where}: metadata.model is {model!r}, this router serves {self._model!r}",
            )
        return pool


class ScalerServer:
    """The listening gRPC server."""

    def __init__(self, server: grpc.aio.Server, port: int) -> None:
        self.port = port
        self._server = server

    async def stop(self) -> None:
        """End every call; KEDA dials again, and polls another router meanwhile."""
        await self._server.stop(0)


async def create_scaler_server(
    source: ScalingSource,
    *,
    model: str,
    host: str,
    port: int,
    credentials: grpc.ServerCredentials | None = None,
) -> ScalerServer:
    """Bind, start, and return the server with its actual port (`port=0` picks one).

    Raises:
        PortInUse: another process listens there.
    """
    server = grpc.aio.server(options=_OPTIONS)
    servicer = ExternalScalerServicer(source, model=model)
    externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server(servicer, server)
    address = f"{host}:{port}"
    problem = f"can't serve KEDA on {address}: is the port in use?"
    try:
        bound = (
            server.add_insecure_port(address)
            if credentials is None
            else server.add_secure_port(address, credentials)
        )
    except RuntimeError as error:
        raise PortInUse(problem) from error
    if bound == 0:
        raise PortInUse(problem)
    await server.start()
    return ScalerServer(server, bound)
