"""The router without its HTTP front: registry, request service and gRPC server, wired once."""

import secrets

from prometheus_client import CollectorRegistry

from kvrelay_protocol.telemetry import Telemetry
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.fleet.servicer import FleetServer, create_fleet_server
from kvrelay_router.metrics import RouterMetrics
from kvrelay_router.requests.service import RouterService


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
    ) -> None:
        self.config = config
        self.metrics = RouterMetrics(metrics_registry or CollectorRegistry())
        self.registry = WorkerRegistry(config)
        self.service = RouterService(config, self.registry, telemetry, self.metrics)
        self.registry.listener = self.service
        self._server: FleetServer | None = None

    @property
    def join_port(self) -> int:
        """The port workers dial, once started."""
        if self._server is None:
            raise RuntimeError("not started")
        return self._server.port

    async def start(self) -> None:
        """Listen for workers.

        Raises:
            PortInUse: another process listens there.
        """
        router_id = secrets.token_hex(8)
        self._server = await create_fleet_server(self.config, self.registry, router_id=router_id)

    async def drain(self) -> None:
        """Refuse new requests and let the open ones end within the grace.

        The workers are not told: they may belong to other routers too, or to the next one here.
        """
        await self.service.drain(self.config.drain_grace_s)

    async def stop(self) -> None:
        """Close every worker's stream; requests still open end in `Draining`. Idempotent."""
        await self.service.drain(0.0)
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(0.2)
