"""The load itself: requests sent on time, whatever the server does, or by a fixed number of users."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvrelay_bench.serve.client import Answer, CompletionClient, Outcome
from kvrelay_bench.serve.workload import PlannedRequest

_PROGRESS_S = 5.0

Encode = Callable[[PlannedRequest], bytes]
"""Makes a request's body."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request that was sent."""

    request: PlannedRequest
    due: float
    """When it should have been sent, by `time.perf_counter`."""
    answer: Answer

    @property
    def lag_s(self) -> float:
        """How late the client was."""
        return self.answer.sent - self.due


@dataclass(slots=True)
class LoadRun:
    """What was sent, and what it cost the client."""

    planned: int
    began: float = 0.0
    ended: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    client_cpu_s: float = 0.0
    """Processor seconds of the client's thread."""
    interrupted: bool = False

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def tally(self) -> str:
        """One line of progress."""
        outcomes = [sample.answer for sample in self.samples]
        done = [answer for answer in outcomes if answer.ended]
        failed = sum(answer.outcome is not Outcome.OK for answer in done)
        seconds = time.perf_counter() - self.began
        return (
            f"  {seconds:6.1f} s  sent {len(outcomes)}/{self.planned}, "
            f"running {len(outcomes) - len(done)}, done {len(done)}, failed {failed}"
        )


class Load:
    """Sends planned requests through one client. `stop` ends it early with what there is."""

    def __init__(
        self,
        client: CompletionClient,
        encode: Encode,
        *,
        stop: asyncio.Event | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._client = client
        self._encode = encode
        self._stop = stop or asyncio.Event()
        self._say = say

    async def open_loop(self, requests: Sequence[PlannedRequest]) -> LoadRun:
        """Send each request at its arrival time, however many are under way."""
        return await self._run(len(requests), lambda run: self._send_on_time(run, requests))

    async def closed_loop(self, requests: Sequence[PlannedRequest], users: int) -> LoadRun:
        """Each of `users` sends the next request when its last one has ended."""
        waiting = iter(requests)

        async def all_users(run: LoadRun) -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(users):
                    group.create_task(self._user(run, waiting))

        return await self._run(len(requests), all_users)

    async def _run(
        self, planned: int, work: Callable[[LoadRun], Coroutine[Any, Any, None]]
    ) -> LoadRun:
        run = LoadRun(planned)
        cpu = time.thread_time()
        run.began = time.perf_counter()
        working = asyncio.ensure_future(work(run))
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            while not (working.done() or stopping.done()):
                await asyncio.wait(
                    {working, stopping},
                    timeout=_PROGRESS_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not working.done():
                    self._say(run.tally())
        finally:
            for task in (working, stopping):
                task.cancel()
            await asyncio.wait({working, stopping})
        run.ended = time.perf_counter()
        run.client_cpu_s = time.thread_time() - cpu
        run.interrupted = working.cancelled()
        if not working.cancelled():
            working.result()
        return run

    async def _send_on_time(self, run: LoadRun, requests: Sequence[PlannedRequest]) -> None:
        async with asyncio.TaskGroup() as group:
            for request in requests:
                body = self._encode(request)  # before its time comes, not after
                due = run.began + request.arrival_s
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(self._send(run, request, due, body))

    async def _user(self, run: LoadRun, waiting: Iterator[PlannedRequest]) -> None:
        for request in waiting:
            body = self._encode(request)
            await self._send(run, request, time.perf_counter(), body)

    async def _send(self, run: LoadRun, request: PlannedRequest, due: float, body: bytes) -> None:
        answer = Answer()
        run.samples.append(Sample(request, due, answer))
        await self._client.complete(body, answer)
