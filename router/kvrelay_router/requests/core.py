"""The router without its HTTP front: registry, request service and gRPC server, wired once."""

import asyncio
import secrets

from prometheus_client import CollectorRegistry

from kvrelay_protocol.telemetry import Telemetry
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.fleet.servicer import FleetServer, create_fleet_server
from kvrelay_router.keda.servicer import ScalerServer, create_scaler_server
from kvrelay_router.keda.source import AskedTargets
from kvrelay_router.metrics import RouterMetrics
from kvrelay_router.requests.service import RouterService
from kvrelay_router.scaling.loop import ScalerLoop, Scaling


class RouterCore:
    """Start, drain, stop: in this order. The HTTP app takes `service`.

    Must be built on a running event loop. The caller owns `telemetry` and shuts it down last.
    """

    def __init__(
        self,
        config: RouterConfig,
        telemetry: Telemetry,
        *,
        metrics_registry: CollectorRegistry | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        """Args: with `scaling` this router says how many workers there are."""
        self.config = config
        self.metrics = RouterMetrics(metrics_registry or CollectorRegistry())
        self.registry = WorkerRegistry(config)
        self.service = RouterService(config, self.registry, telemetry, self.metrics)
        self.registry.listener = self.service
        self._server: FleetServer | None = None
        self._scaler: ScalerLoop | None = None
        self._scaling: asyncio.Task[None] | None = None
        self._asked = (
            scaling.provider
            if scaling is not None and isinstance(scaling.provider, AskedTargets)
            else None
        )
        if scaling is not None:
            service = self.service
            self._scaler = ScalerLoop(scaling, self.registry, service.demand, service)
            service.parking.on_demand = self._scaler.nudge
        self._keda: ScalerServer | None = None

    @property
    def join_port(self) -> int:
        """The port workers dial, once started."""
        if self._server is None:
            raise RuntimeError("not started")
        return self._server.port

    @property
    def scaler_port(self) -> int:
        """The port that KEDA asks, once started with `AskedTargets` as the provider."""
        if self._keda is None:
            raise RuntimeError("not started")
        return self._keda.port

    async def start(self) -> None:
        """Listen for workers.

        Raises:
            PortInUse: another process listens there.
        """
        router_id = secrets.token_hex(8)
        self._server = await create_fleet_server(self.config, self.registry, router_id=router_id)
        source = self._asked
        if source is not None:
            self._keda = await create_scaler_server(
                source,
                model=self.config.model_name,
                host=self.config.join_host,
                port=self.config.scaler_port or 0,
            )
        if self._scaler is not None:
            self._scaling = asyncio.create_task(self._scaler.run(), name="scale the pools")

    async def drain(self) -> None:
        """Refuse new requests and let the open ones end within the grace.

        The workers are not told: they may belong to other routers too, or to the next one here.
        """
        await self.service.drain(self.config.drain_grace_s)

    async def stop(self) -> None:
        """Close every worker's stream; requests still open end in `Draining`. Idempotent."""
        await self.service.drain(0.0)
        if self._scaling is not None:
            self._scaling.cancel()
            await asyncio.gather(self._scaling, return_exceptions=True)
            self._scaling = None
        if self._keda is not None:
            keda, self._keda = self._keda, None
            await keda.stop()
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(0.2)
