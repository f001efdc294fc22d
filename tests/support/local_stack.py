"""A whole stack in one process: real router core, real workers, real transport, real gRPC on port 0."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvrelay_decode.main import serve as serve_decode
from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_engine.runtime.startup import Engine, Phases, start_engine
from kvrelay_prefill.main import serve as serve_prefill
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_protocol.telemetry import Telemetry
from kvrelay_router.config import RouterConfig
from kvrelay_router.requests.core import RouterCore
from kvrelay_router.requests.types import (
    Failed,
    Finished,
    PathKind,
    RequestEvent,
    RequestStream,
    Tokens,
    ValidRequest,
    WorkerView,
)

GREEDY = SamplingParams(temperature=0.0)
PATIENT_S = 60.0
"""Of waits that end in a fault: a machine that stands still for a while causes none. A test that is
about such a wait sets its own."""


@dataclass
class Answer:
    """Everything one request produced."""

    events: list[RequestEvent] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [t for e in self.events if isinstance(e, Tokens) for t in e.ids]

    @property
    def end(self) -> Finished | Failed:
        (end,) = [e for e in self.events if isinstance(e, Finished | Failed)]
        assert end is self.events[-1]
        return end

    def finished(self) -> Finished:
        assert isinstance(self.end, Finished), self.end
        return self.end


class Worker:
    """One worker of the stack; `stop` drains it."""

    def __init__(
        self, name: str, engine: Engine, task: asyncio.Task[None], shutdown: asyncio.Event
    ):
        self.name, self.engine, self.task, self.shutdown = name, engine, task, shutdown

    async def stop(self) -> None:
        self.shutdown.set()
        await self.task


class Stack:
    """Router and workers on the running loop."""

    def __init__(self, model_dir: Path, config: RouterConfig, transport: str) -> None:
        self.model_dir = model_dir
        self.transport = transport
        self.telemetry = Telemetry("test-router", instance="router")
        self.core = RouterCore(config, self.telemetry)
        self.workers: dict[str, Worker] = {}

    async def add_worker(self, role: str, name: str, **settings: object) -> Worker:
        defaults = WorkerConfig(
            name=name,
            model_dir=self.model_dir,
            model_name=self.core.config.model_name,
            router=f"127.0.0.1:{self.core.join_port}",
            dtype="float32",
            kv_memory_bytes=16 * 2**20,
            transport=self.transport,
            threads=1,
            heartbeat_s=0.1,
            lease_s=PATIENT_S,
        )
        config = replace(defaults, **settings)
        phases = Phases()
        engine = await asyncio.to_thread(start_engine, config, phases)
        serve: Callable[..., object] = serve_prefill if role == "prefill" else serve_decode
        shutdown = asyncio.Event()
        task = asyncio.create_task(serve(config, engine, phases, shutdown))
        self.workers[name] = Worker(name, engine, task, shutdown)
        async with asyncio.timeout(60):
            while name not in {w.name for w in self.core.service.health().workers}:
                if task.done():
                    task.result()
                await asyncio.sleep(0.02)
        return self.workers[name]

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        sampling: SamplingParams = GREEDY,
        stop: frozenset[int] = frozenset(),
        path: PathKind | None = None,
        deadline_s: float = 240.0,
        salt: bytes = b"",
    ) -> RequestStream:
        return self.core.service.submit(
            ValidRequest(
                request_id=secrets.token_hex(8),
                model=self.core.config.model_name,
                prompt_tokens=tuple(prompt),
                sampling=sampling,
                max_tokens=max_tokens,
                stop_token_ids=stop,
                deadline_s=deadline_s,
                cache_salt=salt,
                force_path=path,
            ),
        )

    async def answer(self, prompt: list[int], max_tokens: int, **options: object) -> Answer:
        return Answer([event async for event in self.submit(prompt, max_tokens, **options)])

    async def idle_pools(self, timeout_s: float = 60.0) -> list[WorkerView]:
        """Wait until every block of every pool is free or cached and reported so; check the allocators."""
        async with asyncio.timeout(timeout_s):
            while not self._idle():
                await asyncio.sleep(0.02)
        for worker in self.workers.values():
            worker.engine.allocator.check_integrity()
        return list(self.core.service.health().workers)

    def _idle(self) -> bool:
        # Reports may be older than the last request.
        counts = [worker.engine.allocator.counts for worker in self.workers.values()]
        return all(c.free + c.cached == c.total for c in counts) and all(
            w.free_blocks + w.cached_blocks == w.total_blocks and not (w.running or w.waiting)
            for w in self.core.service.health().workers
        )


@contextlib.asynccontextmanager
async def local_stack(
    model_dir: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    transport: str = "inproc",
    prefill_settings: dict[str, object] | None = None,
    decode_settings: dict[str, object] | None = None,
    **router: object,
) -> AsyncIterator[Stack]:
    """Router and workers, stopped and checked for leaks at the end."""
    config = RouterConfig(
        model_dir=model_dir,
        model_name="tiny",
        join_port=0,
        heartbeat_s=0.1,
        queue_timeout_s=2 * PATIENT_S,
        replay_wait_s=PATIENT_S,
        lease_s=PATIENT_S,
    )
    stack = Stack(model_dir, replace(config, **router), transport)
    await stack.core.start()
    try:
        for index in range(prefill):
            await stack.add_worker("prefill", f"prefill-{index}", **(prefill_settings or {}))
        for index in range(decode):
            await stack.add_worker("decode", f"decode-{index}", **(decode_settings or {}))
        yield stack
        if all(not w.task.done() for w in stack.workers.values()):
            await stack.idle_pools()
    finally:
        for worker in stack.workers.values():
            worker.shutdown.set()
        await asyncio.gather(*(w.task for w in stack.workers.values()), return_exceptions=True)
        await stack.core.stop()
        stack.telemetry.shutdown()
