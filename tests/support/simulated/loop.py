"""An asyncio loop without a clock and without I/O: time passes, and threads run, when a test says so."""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Self


class _NoSelector:
    """Nothing ever becomes readable."""

    def select(self, timeout: float | None = None) -> list[object]:
        return []


class CopyThread:
    """Stands in for a `ThreadPoolExecutor` of one thread: runs its oldest job when it is told to."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()

    def run(self) -> None:
        work, future = self.jobs.popleft()
        try:
            result = work()
        except BaseException as error:
            if not future.done():
                future.set_exception(error)
            return
        if not future.done():
            future.set_result(result)

    def shutdown(self, *, wait: bool = True) -> None:
        pass


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs what is ready, in order; `now` moves by `advance` only."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.defects: list[str] = []
        self._selector = _NoSelector()
        self.set_exception_handler(self._note)

    def _note(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.defects.append(f"{context.get('message')}: {context.get('exception')!r}")

    def time(self) -> float:
        return self.now

    def _process_events(self, event_list: list[object]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass  # nobody sleeps in a selector

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        assert isinstance(executor, CopyThread) and not args
        future = self.create_future()
        executor.jobs.append((func, future))
        return future

    def settle(self) -> None:
        """Run until nothing is ready at this moment."""
        for _ in range(10_000):
            if not self._ready:
                return
            self._run_once()
        raise AssertionError("the loop never settles")

    def next_timer(self) -> float | None:
        """When something is due that has not been cancelled."""
        while self._scheduled and self._scheduled[0].cancelled():
            timer = heapq.heappop(self._scheduled)
            timer._scheduled = False
            self._timer_cancelled_count -= 1
        return self._scheduled[0].when() if self._scheduled else None

    def advance(self, seconds: float) -> None:
        """Let time pass, timer by timer."""
        end = self.now + seconds
        self.settle()
        while (due := self.next_timer()) is not None and due <= end:
            self.now = max(self.now, due)
            self._run_once()
            self.settle()
        self.now = end

    def __enter__(self) -> Self:
        asyncio._set_running_loop(self)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio._set_running_loop(None)
        self.close()

    def clock(self) -> SimpleNamespace:
        """What replaces the module `time` in the code under test."""
        return SimpleNamespace(
            monotonic=lambda: self.now,
            perf_counter=lambda: self.now,
            time=lambda: 1e9 + self.now,
            time_ns=lambda: int((1e9 + self.now) * 1e9),
        )
