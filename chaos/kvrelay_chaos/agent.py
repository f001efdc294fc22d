"""Inside a worker's process: takes orders for faults, and says what the worker holds.

It dials the stack's socket and speaks JSON, a line each:

```
agent ──► {"name", "pid"}                        once
agent ◄── {"id", "do", ...}                      ──► {"id", "result"} or {"id", "error"}
agent ──► {"hit": number}                        a KV fault with that number found its message
```
"""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from kvrelay_chaos.kv_plane import PLANE, KvOrder
from kvrelay_engine.cache.allocator import Allocation, BlockAllocator
from kvrelay_engine.runtime.host import Worker, WorkerHost
from kvrelay_engine.runtime.step_loop import SchedulerT
from kvrelay_transfer.kit import TransferKit

T = TypeVar("T")
WorkerT = TypeVar("WorkerT", bound=Worker)


class Clock:
    """The wall clock of this process, which can jump. Monotonic clocks never do."""

    def __init__(self) -> None:
        self.offset_s = 0.0
        self._time, self._time_ns = time.time, time.time_ns

    def install(self) -> None:
        """Take the place of `time.time` and `time.time_ns`."""
        for name, function in (("time", self.time), ("time_ns", self.time_ns)):
            setattr(time, name, function)

    def time(self) -> float:
        return self._time() + self.offset_s

    def time_ns(self) -> int:
        return self._time_ns() + int(self.offset_s * 1e9)


class Agent:
    """Owned by the worker's event loop. `kit` and `host` are filled in as the worker makes them."""

    def __init__(self, name: str, socket: str, clock: Clock) -> None:
        self._name = name
        self._socket = socket
        self._clock = clock
        self._kit: TransferKit | None = None
        self._host: WorkerHost | None = None
        self._worker: Worker | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._blocks_held = 0
        """KV blocks that this agent holds itself. Engine thread."""

    # ---- how the worker's own functions are wrapped

    def watch_kit(
        self, make: Callable[..., Awaitable[TransferKit]]
    ) -> Callable[..., Awaitable[TransferKit]]:
        """Wrap `make_kit`: what it makes is what this agent speaks of. Begins to take orders."""

        async def make_and_keep(*args: Any, **kwargs: Any) -> TransferKit:
            self._kit = await make(*args, **kwargs)
            self._start(self._serve())
            return self._kit

        return make_and_keep

    def watch_host(self, make: Callable[..., WorkerHost]) -> Callable[..., WorkerHost]:
        """Wrap the making of a `WorkerHost`."""

        def make_and_keep(*args: Any, **kwargs: Any) -> WorkerHost:
            self._host = make(*args, **kwargs)
            return self._host

        return make_and_keep

    def watch_worker(self, make: Callable[..., WorkerT]) -> Callable[..., WorkerT]:
        """Wrap the making of the worker."""

        def make_and_keep(*args: Any, **kwargs: Any) -> WorkerT:
            worker = make(*args, **kwargs)
            self._worker = worker
            return worker

        return make_and_keep

    def watch_scheduler(self, make: Callable[..., SchedulerT]) -> Callable[..., SchedulerT]:
        """Wrap the making of a scheduler: its check of the pool shall not miss the blocks held here."""

        def make_and_watch(*args: Any, **kwargs: Any) -> SchedulerT:
            scheduler = make(*args, **kwargs)
            check = scheduler.check_integrity

            def check_unless_held() -> None:
                if not self._blocks_held:
                    check()

            setattr(scheduler, "check_integrity", check_unless_held)  # noqa: B010 - of this one object
            return scheduler

        return make_and_watch

    # ---- orders

    async def _serve(self) -> None:
        reader, writer = await asyncio.open_unix_connection(self._socket)
        self._write(writer, {"name": self._name, "pid": os.getpid()})
        while line := await reader.readline():
            self._start(self._answer(json.loads(line), writer))

    async def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        number = request.pop("id")
        try:
            result = await self._carry_out(request, writer)
            self._write(writer, {"id": number, "result": result})
        except Exception as error:
            self._write(writer, {"id": number, "error": f"{type(error).__name__}: {error}"})

    async def _carry_out(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> object:
        match request.pop("do"):
            case "kv":
                number = request.pop("number")
                armed = PLANE.orders.arm(KvOrder(**request))
                armed.hit.add_done_callback(lambda _: self._write(writer, {"hit": number}))
                return len(PLANE.orders)
            case "counts":
                return await self._counts()
            case "hold_blocks":
                return await self._hold_blocks(request["seconds"])
            case "hold_staging":
                return self._hold_staging(request["seconds"])
            case "clock":
                self._clock.offset_s = request["offset_s"]
                asyncio.get_running_loop().call_later(request["seconds"], self._reset_clock)
                return True
            case other:
                raise ValueError(f"an agent can't {other}")

    async def _counts(self) -> dict[str, int]:
        """What the worker holds, as of between two steps. Raises where its books do not balance."""
        host, kit = self._here()

        def count() -> dict[str, int]:
            allocator = host.engine.allocator
            allocator.check_integrity()
            counts = allocator.counts
            held = counts.leased + counts.in_use
            return {"blocks": counts.total, "held_blocks": held, "cached_blocks": counts.cached}

        found = await self._on_engine(count)
        kit.staging.check_integrity()
        open_sequences = self._worker.open_sequences if self._worker else 0
        return found | {"held_staging": kit.staging.held, "open_sequences": open_sequences}

    async def _hold_blocks(self, seconds: float) -> int:
        """Take all blocks that are free or cached, and give them back later."""
        host, _ = self._here()
        taken = await self._on_engine(lambda: self._take_blocks(host.engine.allocator))
        if taken is None:
            return 0

        def give_back() -> None:
            host.post(lambda: self._give_blocks(host.engine.allocator, taken))

        asyncio.get_running_loop().call_later(seconds, give_back)
        return len(taken.blocks)

    def _take_blocks(self, pool: BlockAllocator) -> Allocation | None:
        taken = pool.allocate(pool.available) if pool.available else None
        self._blocks_held += len(taken.blocks) if taken else 0
        return taken

    def _give_blocks(self, pool: BlockAllocator, taken: Allocation) -> None:
        pool.release(taken.blocks)
        self._blocks_held -= len(taken.blocks)

    def _hold_staging(self, seconds: float) -> int:
        _, kit = self._here()
        taken = []
        while (staging := kit.staging.try_acquire()) is not None:
            taken.append(staging)

        def give_back() -> None:
            for staging in taken:
                staging.release()

        asyncio.get_running_loop().call_later(seconds, give_back)
        return len(taken)

    def _reset_clock(self) -> None:
        self._clock.offset_s = 0.0

    # ---- tools

    def _here(self) -> tuple[WorkerHost, TransferKit]:
        if self._host is None or self._kit is None:
            raise RuntimeError("the worker is still starting")
        return self._host, self._kit

    async def _on_engine(self, work: Callable[[], T]) -> T:
        """Run `work` on the engine thread, between two steps."""
        host, _ = self._here()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = work()
            except Exception as error:
                loop.call_soon_threadsafe(done.set_exception, error)
            else:
                loop.call_soon_threadsafe(done.set_result, result)

        host.post(run)
        # Nobody cancels the wait for it: an order is carried out to its end.
        return await done

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    def _write(writer: asyncio.StreamWriter, message: dict[str, object]) -> None:
        # The stack may be gone; then so will this process be.
        with contextlib.suppress(OSError, RuntimeError):
            writer.write(json.dumps(message).encode() + b"\n")
