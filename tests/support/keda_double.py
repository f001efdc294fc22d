"""KEDA's operator and the HPA it makes, on a virtual clock, calling a real external scaler over gRPC.

Followed from the published behaviour: `RequestScale` of KEDA's executor, the HPA's AverageValue
arithmetic with tolerance, scale-up policies and scale-down stabilisation, and the hold on a metric
that can't be read. Not followed: fallback replicas, scaling modifiers, the HPA's own error backoff.
"""

import asyncio
import contextlib
import heapq
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import grpc.aio

from kvrelay_infra.providers import Pool, Provider
from kvrelay_protocol import externalscaler_pb2 as pb
from kvrelay_protocol import externalscaler_pb2_grpc

HPA_SYNC_S = 15.0
HPA_TOLERANCE = 0.1
HPA_STABILISATION_S = 300.0
HPA_UP_PODS, HPA_UP_RATIO = 4, 2.0
"""Default scale-up policies: four pods or twice as many, the larger, every 15 s."""


@dataclass(frozen=True)
class ScaledObject:
    """One pool's ScaledObject; a trigger per scaler address."""

    pool: Pool
    addresses: tuple[str, ...]
    model: str = ""
    polling_interval_s: float = 30.0
    cooldown_s: float = 300.0
    min_replicas: int = 0
    max_replicas: int = 100

    @property
    def ref(self) -> pb.ScaledObjectRef:
        metadata = {"pool": self.pool.value, "model": self.model}
        return pb.ScaledObjectRef(
            name=f"kvrelay-{self.pool}", namespace="test", scalerMetadata=metadata
        )


@dataclass
class _State:
    spec: ScaledObject
    scalers: list[externalscaler_pb2_grpc.ExternalScalerStub]
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    last_active_s: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Target per replica by metric."""
    recommended: list[tuple[float, int]] = field(default_factory=list)
    """(virtual time, replicas): what the HPA would have liked, for its stabilisation."""


class KedaDouble:
    """Use `running()`; then time passes only in `advance`, but pushed activations act at once."""

    def __init__(self, provider: Provider, *objects: ScaledObject) -> None:
        self.now = 0.0
        self.unreadable: list[str] = []
        """Why a metric could not be read, in order."""
        self._provider = provider
        self._objects = objects
        self._states: list[_State] = []
        self._due: list[tuple[float, int, int]] = []
        self._scaled = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["KedaDouble"]:
        """KEDA has seen the ScaledObjects: streams are open, polls and syncs are due."""
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            for number, spec in enumerate(self._objects):
                channels = [
                    await stack.enter_async_context(grpc.aio.insecure_channel(address))
                    for address in spec.addresses
                ]
                stubs = [externalscaler_pb2_grpc.ExternalScalerStub(x) for x in channels]
                state = _State(spec, stubs)
                self._states.append(state)
                heapq.heappush(self._due, (spec.polling_interval_s, 2 * number, number))
                heapq.heappush(self._due, (HPA_SYNC_S, 2 * number + 1, number))
                for stub in stubs:
                    tasks.create_task(self._follow(state, stub))
            try:
                yield self
            finally:
                for task in tasks._tasks:
                    task.cancel()

    async def advance(self, seconds: float) -> None:
        """Let virtual time pass; everything due on the way is done in order."""
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            self.now, kind, number = heapq.heappop(self._due)
            state = self._states[number]
            if kind % 2:
                await self._sync_hpa(state)
                heapq.heappush(self._due, (self.now + HPA_SYNC_S, kind, number))
            else:
                await self._poll(state)
                later = self.now + state.spec.polling_interval_s
                heapq.heappush(self._due, (later, kind, number))
        self.now = until

    async def replicas(self, pool: Pool) -> int:
        return (await self._provider.describe())[pool].desired

    async def until_scaled(self, pool: Pool, replicas: int) -> None:
        """Wait, in real time, for a push to have been acted upon."""
        async with asyncio.timeout(60), self._scaled:
            while await self.replicas(pool) != replicas:
                await self._scaled.wait()

    async def _follow(
        self, state: _State, stub: externalscaler_pb2_grpc.ExternalScalerStub
    ) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for answer in stub.StreamIsActive(state.spec.ref, wait_for_ready=True):
                    await self._request_scale(state, active=answer.result, failed=False)

    async def _poll(self, state: _State) -> None:
        active, failed = False, False
        for stub in state.scalers:
            try:
                for name in await self._metrics(state, stub):
                    await self._metric(state, stub, name)
                active |= (await stub.IsActive(state.spec.ref)).result
            except grpc.aio.AioRpcError as error:
                self.unreadable.append(error.details() or "")
                failed = True
        await self._request_scale(state, active=active, failed=failed)

    async def _request_scale(self, state: _State, *, active: bool, failed: bool) -> None:
        async with state.lock:
            spec, current = state.spec, await self.replicas(state.spec.pool)
            if active:
                if current == 0:
                    await self._scale(state, max(spec.min_replicas, 1))
                state.last_active_s = self.now
            elif failed:
                return  # no active trigger, but not all were heard: nothing is done
            elif current > 0 and spec.min_replicas == 0:
                last = state.last_active_s
                if last is None or last + spec.cooldown_s < self.now:
                    await self._scale(state, 0)
            elif current < spec.min_replicas:
                await self._scale(state, spec.min_replicas)

    async def _sync_hpa(self, state: _State) -> None:
        async with state.lock:
            current = await self.replicas(state.spec.pool)
            if current == 0:
                return  # an HPA is disabled while its target has no replicas
            proposals, failed = [], False
            for stub in state.scalers:
                try:
                    for name, target in (await self._metrics(state, stub)).items():
                        value = await self._metric(state, stub, name)
                        proposals.append(_average_value(value, target, current))
                except grpc.aio.AioRpcError as error:
                    self.unreadable.append(error.details() or "")
                    failed = True
            if not proposals or (failed and max(proposals) < current):
                return
            wanted = self._stabilised(state, max(proposals), current)
            limit = max(current + HPA_UP_PODS, math.ceil(current * HPA_UP_RATIO))
            wanted = min(max(wanted, state.spec.min_replicas, 1), state.spec.max_replicas, limit)
            if wanted != current:
                await self._scale(state, wanted)

    def _stabilised(self, state: _State, wanted: int, current: int) -> int:
        if not state.recommended:
            state.recommended.append((self.now, current))
        state.recommended = [
            (when, replicas)
            for when, replicas in state.recommended
            if when > self.now - HPA_STABILISATION_S
        ]
        state.recommended.append((self.now, wanted))
        if wanted >= current:
            return wanted
        return min(max(replicas for _, replicas in state.recommended), current)

    async def _metrics(
        self, state: _State, stub: externalscaler_pb2_grpc.ExternalScalerStub
    ) -> dict[str, float]:
        if not state.metrics:  # asked once, for the HPA that KEDA makes
            specs = (await stub.GetMetricSpec(state.spec.ref)).metricSpecs
            state.metrics = {spec.metricName: spec.targetSizeFloat for spec in specs}
        return state.metrics

    async def _metric(
        self, state: _State, stub: externalscaler_pb2_grpc.ExternalScalerStub, name: str
    ) -> float:
        request = pb.GetMetricsRequest(scaledObjectRef=state.spec.ref, metricName=name)
        [value] = (await stub.GetMetrics(request)).metricValues
        return value.metricValueFloat if value.metricValueFloat > 0 else float(value.metricValue)

    async def _scale(self, state: _State, replicas: int) -> None:
        await self._provider.scale(state.spec.pool, replicas)
        async with self._scaled:
            self._scaled.notify_all()


def _average_value(value: float, target: float, current: int) -> int:
    """Replicas that bring the value per replica to the target, unless it is about there already."""
    if abs(1.0 - value / (target * current)) <= HPA_TOLERANCE:
        return current
    return math.ceil(value / target)
