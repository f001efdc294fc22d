"""The thread that owns scheduler, allocator, KV pool and model: receive, schedule, step, commit."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kvrelay_engine.batch import Batch, StepResult

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """What a scheduler reports of itself after every turn of the loop."""

    running: int
    waiting: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    leased_blocks: int
    used_blocks: int
    backlog_tokens: int
    preemptions: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Prompt tokens found there."""


EventT_co = TypeVar("EventT_co", covariant=True)


class Scheduler(Protocol[EventT_co]):
    """What the loop needs; both workers' schedulers are one. Called from the loop's thread only."""

    def schedule(self) -> Batch | None: ...

    def commit(self, batch: Batch, result: StepResult) -> None: ...

    def take_events(self) -> Sequence[EventT_co]:
        """Events since the last call, in order."""

    def load(self) -> LoadSnapshot: ...

    def check_integrity(self) -> None: ...


SchedulerT = TypeVar("SchedulerT", bound=Scheduler[object])


class StepLoop(threading.Thread):
    """Runs one scheduler against one engine until stopped.

    Commands posted from other threads run between steps, so the scheduler needs no lock. Events and
    failures go out through callbacks, which must be safe to call from this thread.
    """

    def __init__(
        self,
        scheduler: SchedulerT,
        step: Callable[[Batch], StepResult],
        *,
        on_events: Callable[[Sequence[object]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self._scheduler: Scheduler[object] = scheduler
        self._step = step
        self._on_events = on_events
        self._on_failure = on_failure
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopping = False
        self.load = scheduler.load()
        """The last snapshot; replaced, never changed, so any thread may read it."""

    def post(self, command: Callable[[], None]) -> None:
        """Run `command` on the loop's thread before the next step."""
        self._commands.put(command)

    def stop(self) -> None:
        """Ask the loop to end after the running step; `join` waits for it."""
        self._commands.put(None)

    def run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:
            log.exception("the engine loop failed")
            self._on_failure(error)

    def _turn(self) -> None:
        self._run_commands(wait=False)
        batch = self._scheduler.schedule()
        if batch is not None:
            self._publish()  # admissions go out before the step that computes them
            self._scheduler.commit(batch, self._step(batch))
        self._publish()
        if batch is None and not self._stopping:
            self._scheduler.check_integrity()
            self._run_commands(wait=True)

    def _publish(self) -> None:
        self.load = self._scheduler.load()
        events = self._scheduler.take_events()
        if events:
            self._on_events(events)

    def _run_commands(self, *, wait: bool) -> None:
        try:
            command = self._commands.get(block=wait)
            while True:
                if command is None:
                    self._stopping = True
                else:
                    command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return
