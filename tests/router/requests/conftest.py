from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

import pytest
from fake_worker import FakeFabric, FakeWorker, Script
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvrelay_protocol.sampling import SamplingParams
from kvrelay_protocol.telemetry import Telemetry
from kvrelay_router.config import RouterConfig
from kvrelay_router.requests.core import RouterCore
from kvrelay_router.requests.types import (
    Failed,
    Finished,
    RequestEvent,
    RequestStream,
    Tokens,
    ValidRequest,
)
from kvrelay_router.scaling.loop import Scaling

CONFIG = RouterConfig(
    model_dir=FilePath("unused"),
    model_name="demo",
    join_port=0,
    heartbeat_s=0.2,
    replay_wait_s=0.5,
    queue_timeout_s=5.0,
    drain_grace_s=5.0,
)


def a_request(**changes: object) -> ValidRequest:
    request = ValidRequest(
        request_id="req-1",
        model="demo",
        prompt_tokens=tuple(range(1, 41)),
        sampling=SamplingParams(temperature=0.0),
        max_tokens=8,
        stop_token_ids=frozenset({2}),
        deadline_s=20.0,
    )
    return replace(request, **changes)


@dataclass
class Rig:
    """A router core with fake workers and a recorder of spans."""

    core: RouterCore
    spans: InMemorySpanExporter
    fabric: FakeFabric
    join: Callable[..., Awaitable[FakeWorker]]

    def submit(self, **changes: object) -> RequestStream:
        return self.core.service.submit(a_request(**changes))

    def metric(self, name: str, **labels: str) -> float:
        return self.core.metrics.registry.get_sample_value(f"kvrelay_{name}", labels) or 0.0


@pytest.fixture
async def make_rig() -> AsyncIterator[Callable[..., Awaitable[Rig]]]:
    async with AsyncExitStack() as stack:

        async def make(*, scaling: Scaling | None = None, **config: object) -> Rig:
            spans = InMemorySpanExporter()
            telemetry = Telemetry("router", instance="t", processors=[SimpleSpanProcessor(spans)])
            stack.callback(telemetry.shutdown)
            core = RouterCore(replace(CONFIG, **config), telemetry, scaling=scaling)
            await core.start()
            stack.push_async_callback(core.stop)
            fabric = FakeFabric()

            async def join(
                name: str, role: str, *, asleep: bool = False, **script: object
            ) -> FakeWorker:
                worker = FakeWorker(
                    core.join_port,
                    name,
                    role,
                    fabric,
                    script=Script(**script),
                    change_hello=lambda hello: setattr(hello, "asleep", asleep),
                )
                return await stack.enter_async_context(worker)

            return Rig(core, spans, fabric, join)

        yield make


async def collect(stream: RequestStream) -> list[RequestEvent]:
    return [event async for event in stream]


def tokens_of(events: list[RequestEvent]) -> tuple[int, ...]:
    return tuple(i for event in events if isinstance(event, Tokens) for i in event.ids)


def terminals_of(events: list[RequestEvent]) -> list[RequestEvent]:
    return [event for event in events if isinstance(event, Finished | Failed)]
