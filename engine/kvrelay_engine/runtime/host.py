"""One worker process around its scheduler: the Join stream, the engine thread, drain and shutdown."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from kvrelay_engine.batch import Batch, StepResult
from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_engine.runtime.join import JoinLink
from kvrelay_engine.runtime.messages import load_message
from kvrelay_engine.runtime.startup import Engine, Phases
from kvrelay_engine.runtime.step_loop import Scheduler, StepLoop
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import EngineFailed
from kvrelay_protocol.versions import JOIN_VERSION

log = logging.getLogger(__name__)

LEAVE_S = 2.0
"""For the router to read a drained worker's last messages."""
STOP_S = 10.0
"""For transfers to confirm their cancel, and for the running step to end."""


def software_version() -> str:
    """Version of the installed package."""
    try:
        return version("kvrelay")
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, slots=True)
class Advertisement:
    """What a worker says of its KV plane in its hello."""

    role: pb.Role
    kv_layout: pb.KvLayout
    transport: str
    transport_address: bytes


class Worker(Protocol):
    """What differs between the two workers. All methods run on the event loop's thread."""

    @property
    def open_sequences(self) -> int:
        """Sequences this worker still owes something to."""

    async def wait_idle(self) -> None:
        """Return when `open_sequences` is zero."""

    def handle(self, message: pb.RouterMessage) -> None: ...

    def events(self, events: Sequence[object]) -> None:
        """What the scheduler did, in order."""

    def drop_all(self, reason: str) -> None:
        """The router is gone: cancel every sequence and give up every lease."""

    def add_load(self, load: pb.Load) -> None:
        """Fill in what only this worker measures."""


@dataclass(slots=True)
class WorkerHost:
    """Connects a `Worker` to the router and to the engine thread."""

    config: WorkerConfig
    engine: Engine
    phases: Phases
    incarnation: int = field(default_factory=lambda: secrets.randbits(64))
    _worker: Worker | None = None
    _advertisement: Advertisement | None = None
    _shutdown: asyncio.Event | None = None
    _joined_before: bool = False
    _link: JoinLink | None = None
    _loop: StepLoop | None = None

    def post(self, command: Callable[[], None]) -> None:
        """Run a command on the engine thread between two steps."""
        if self._loop is not None:
            self._loop.post(command)

    def send(self, message: pb.WorkerMessage) -> None:
        """Queue a message for the router, in order."""
        if self._link is not None:
            self._link.send(message)

    async def run(
        self,
        worker: Worker,
        advertisement: Advertisement,
        scheduler: Scheduler[object],
        step: Callable[[Batch], StepResult],
        shutdown: asyncio.Event,
    ) -> None:
        """Serve until `shutdown` is set (by a signal or by the router's Drain), then drain.

        Raises:
            StartupError: the router refused this worker.
            EngineFailed: the engine loop failed; its log has the reason.
        """
        running = asyncio.get_running_loop()
        failed: asyncio.Future[BaseException] = running.create_future()
        self._worker, self._advertisement, self._shutdown = worker, advertisement, shutdown

        def fail(error: BaseException) -> None:
            running.call_soon_threadsafe(failed.set_result, error)

        def deliver(events: Sequence[object]) -> None:
            running.call_soon_threadsafe(worker.events, events)

        loop = self._loop = StepLoop(scheduler, step, on_events=deliver, on_failure=fail)
        link = self._link = JoinLink(self.config.router, self, heartbeat_s=self.config.heartbeat_s)
        loop.start()
        joined = asyncio.create_task(link.run(self._announce))
        try:
            await _unless_broken(shutdown.wait(), joined, failed)
            # Take no new work, finish what runs, and say all of it.
            self._say_drained()
            grace_s = self.config.drain_grace_s
            if not await _in_time(_unless_broken(worker.wait_idle(), joined, failed), grace_s):
                log.warning("%d sequences did not end in %g s", worker.open_sequences, grace_s)
            link.leave()
            await asyncio.wait({joined}, timeout=LEAVE_S)
        finally:
            joined.cancel()
            await asyncio.gather(joined, return_exceptions=True)
            worker.drop_all("worker stops")
            await _in_time(worker.wait_idle(), STOP_S)
            loop.stop()
            await asyncio.to_thread(loop.join, STOP_S)

    def _say_drained(self) -> None:
        self.send(pb.WorkerMessage(drained=pb.Drained()))

    # ---- JoinHandler

    def hello(self) -> pb.Hello:
        assert self._advertisement is not None  # noqa: S101 - set before the link is made
        return pb.Hello(
            protocol_version=JOIN_VERSION,
            software_version=software_version(),
            worker_name=self.config.name,
            incarnation=self.incarnation,
            role=self._advertisement.role,
            model=self.config.model_name,
            kv_layout=self._advertisement.kv_layout,
            transport=self._advertisement.transport,
            transport_address=self._advertisement.transport_address,
            max_model_len=self.engine.max_model_len,
            device=self.config.device,
            load=self.heartbeat(),
            join_token=self.config.join_token,
        )

    def heartbeat(self) -> pb.Load:
        assert self._loop is not None and self._worker is not None  # noqa: S101, PT018 - as above
        load = load_message(self._loop.load)
        self._worker.add_load(load)
        return load

    def handle(self, message: pb.RouterMessage) -> None:
        assert self._worker is not None and self._shutdown is not None  # noqa: S101, PT018 - as above
        if message.WhichOneof("message") == "drain":
            self._shutdown.set()
        else:
            self._worker.handle(message)

    def disconnected(self) -> None:
        if self._worker is not None:
            self._worker.drop_all("the router is gone")

    def _announce(self) -> None:
        after = "again" if self._joined_before else f"after {self.phases.elapsed:.2f} s"
        self._joined_before = True
        self.phases.line(f"joined {self.config.router} {after}")
        if self._shutdown is not None and self._shutdown.is_set():
            self._say_drained()  # to a router that started while this worker drains


async def _in_time(work: Coroutine[Any, Any, object], seconds: float) -> bool:
    """Returns whether `work` ended within its time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work
            return True
    return False


async def _unless_broken(
    work: Coroutine[Any, Any, object],
    joined: asyncio.Task[None],
    failed: asyncio.Future[BaseException],
) -> None:
    """Wait for `work`, unless the link or the engine ends first.

    Raises:
        StartupError: the router refused this worker.
        EngineFailed: the engine loop failed.
    """
    task = asyncio.ensure_future(work)
    try:
        waited: set[asyncio.Future[Any]] = {task, joined, failed}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
    if failed.done():
        raise EngineFailed(f"the engine loop failed: {failed.result()!r}")
    if joined.done():
        await joined
