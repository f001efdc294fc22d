"""One worker process around its scheduler: the Join stream, the engine thread, drain and shutdown."""

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from kvrelay_engine.batch import Batch, StepResult
from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_engine.runtime.join import JoinFaults, JoinLink
from kvrelay_engine.runtime.join_tls import join_tls
from kvrelay_engine.runtime.messages import load_message
from kvrelay_engine.runtime.sleep import WORK, Sleeper
from kvrelay_engine.runtime.startup import Engine, Phases
from kvrelay_engine.runtime.step_loop import Scheduler, StepLoop
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import EngineFailed, StartupError
from kvrelay_protocol.versions import JOIN_VERSION

log = logging.getLogger(__name__)

LEAVE_S = 2.0
"""For the router to read a drained worker's last messages."""
REFUSED_S = 5.0
"""Until a router that refused this worker, while others have it, is asked again."""
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
    weights_id: str = ""
    """Of the weights it can send to others."""


class Worker(Protocol):
    """What differs between the two workers. All methods run on the event loop's thread."""

    @property
    def open_sequences(self) -> int:
        """Sequences this worker still owes something to."""

    async def wait_idle(self) -> None:
        """Return when `open_sequences` is zero."""

    def handle(self, message: pb.RouterMessage, session: int) -> None:
        """A session's router says this of one of its sequences."""

    def pulse(self, pulse: pb.Pulse, session: int) -> Sequence[int]:
        """A session's router has just these sequences: let go of its others.

        Returns:
            Ids, as that router calls them, of those that this worker does not have.
        """

    def events(self, events: Sequence[object]) -> None:
        """What the scheduler did, in order."""

    def drop(self, session: int, reason: str) -> None:
        """A router is gone: cancel its sequences and give up its leases."""

    def drop_all(self, reason: str) -> None:
        """Cancel every sequence and give up every lease."""

    def add_load(self, load: pb.Load) -> None:
        """Fill in what only this worker measures."""


@dataclass(slots=True)
class WorkerHost:
    """Connects a `Worker` to its routers and to the engine thread."""

    config: WorkerConfig
    engine: Engine
    phases: Phases
    incarnation: int = field(default_factory=lambda: secrets.randbits(64))
    on_weights_offer: Callable[[pb.OfferWeights], None] | None = None
    """Told who may read this worker's weights."""
    _worker: Worker | None = None
    _advertisement: Advertisement | None = None
    _shutdown: asyncio.Event | None = None
    _joined_before: set[str] = field(default_factory=set)
    """Join addresses."""
    _links: tuple[JoinLink, ...] = ()
    _refused: set[str] = field(default_factory=set)
    """Join addresses whose router does not take this worker."""
    _sessions: Iterator[int] = field(default_factory=itertools.count)
    _by_session: dict[int, JoinLink] = field(default_factory=dict)
    _unknown: dict[int, Sequence[int]] = field(default_factory=dict)
    """By session: what its next heartbeat has to say."""
    _faults: JoinFaults = field(default_factory=JoinFaults)
    _loop: StepLoop | None = None
    _sleeper: Sleeper | None = None

    def post(self, command: Callable[[], None]) -> None:
        """Run a command on the engine thread between two steps."""
        if self._loop is not None:
            self._loop.post(command)

    def send(self, message: pb.WorkerMessage, session: int) -> None:
        """Queue a message for the session's router, in order; dropped when that is gone."""
        link = self._by_session.get(session)
        if link is not None:
            link.send(message)

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
            StartupError: every router refused this worker.
            UsageError: the certificates for its routers can't be used.
            EngineFailed: the engine loop failed; its log has the reason.
        """
        tls = join_tls(self.config)
        running = asyncio.get_running_loop()
        failed: asyncio.Future[BaseException] = running.create_future()
        self._worker, self._advertisement, self._shutdown = worker, advertisement, shutdown

        def fail(error: BaseException) -> None:
            running.call_soon_threadsafe(failed.set_result, error)

        def deliver(events: Sequence[object]) -> None:
            running.call_soon_threadsafe(worker.events, events)

        loop = self._loop = StepLoop(scheduler, step, on_events=deliver, on_failure=fail)
        self._sleeper = Sleeper(
            self.engine,
            scheduler.load,
            busy=lambda: worker.open_sequences > 0,
            post=self.post,
            send=self.send,
            say=self.phases.line,
        )
        self._links = tuple(
            JoinLink(
                router,
                self,
                heartbeat_s=self.config.heartbeat_s,
                sessions=self._sessions,
                tls=tls,
                faults=self._faults,
            )
            for router in self.config.routers
        )
        loop.start()
        joined = asyncio.create_task(self._stay_joined())
        try:
            await _unless_broken(shutdown.wait(), joined, failed)
            # Take no new work, finish what runs, and say all of it.
            self._say_drained()
            grace_s = self.config.drain_grace_s
            idle = await _in_time(_unless_broken(worker.wait_idle(), joined, failed), grace_s)
            if not idle and worker.open_sequences:
                log.warning("%d sequences did not end in %g s", worker.open_sequences, grace_s)
            for link in self._links:
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
        for link in self._by_session.values():
            link.send(pb.WorkerMessage(drained=pb.Drained()))

    async def _stay_joined(self) -> None:
        """Until every link has left.

        Raises:
            StartupError: every router refused this worker.
        """
        staying = [asyncio.ensure_future(self._stay(link)) for link in self._links]
        try:
            await asyncio.gather(*staying)
        finally:
            for task in staying:
                task.cancel()
            await asyncio.gather(*staying, return_exceptions=True)

    async def _stay(self, link: JoinLink) -> None:
        while True:
            try:
                return await link.run(lambda: self._announce(link))
            except StartupError as refusal:
                self._refused.add(link.router)
                if len(self._refused) == len(self._links):
                    raise
                log.error("%s; asking again every %g s", refusal, REFUSED_S)
            await asyncio.sleep(REFUSED_S)

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
            load=self._load(),
            join_token=self.config.join_token,
            asleep=self._sleeper is not None and self._sleeper.asleep,
            weights_id=self._advertisement.weights_id,
        )

    def heartbeat(self, session: int) -> pb.Heartbeat:
        return pb.Heartbeat(load=self._load(), unknown=self._unknown.pop(session, ()))

    def handle(self, message: pb.RouterMessage, session: int) -> None:
        assert self._worker and self._shutdown and self._sleeper  # noqa: S101, PT018 - as above
        match message.WhichOneof("message"):
            case "drain":
                self._shutdown.set()
            case "sleep":
                self._sleeper.sleep(session, message.sleep.order)
            case "wake":
                self._sleeper.wake(session, message.wake.order)
            case "offer_weights":
                if self.on_weights_offer is not None:
                    self.on_weights_offer(message.offer_weights)
            case "pulse":
                self._unknown[session] = self._worker.pulse(message.pulse, session)
            case kind:
                if kind in WORK:
                    self._sleeper.rouse()
                self._worker.handle(message, session)

    def disconnected(self, session: int) -> None:
        self._by_session.pop(session, None)
        self._unknown.pop(session, None)
        if self._sleeper is not None:
            self._sleeper.left(session)
        if self._worker is not None:
            self._worker.drop(session, "the router is gone")

    def _load(self) -> pb.Load:
        assert self._loop is not None and self._worker is not None  # noqa: S101, PT018 - as above
        load = load_message(self._loop.load)
        load.repeated_messages = self._faults.repeated
        load.missing_messages = self._faults.missing
        load.silent_routers = self._faults.silent
        self._worker.add_load(load)
        return load

    def _announce(self, link: JoinLink) -> None:
        self.phases.ready()
        self._by_session[link.session] = link
        self._refused.discard(link.router)
        after = (
            "again" if link.router in self._joined_before else f"after {self.phases.elapsed:.2f} s"
        )
        self._joined_before.add(link.router)
        self.phases.line(f"joined {link.router} {after}")
        if self._sleeper is not None:
            self._sleeper.joined(link.session)
        if self._shutdown is not None and self._shutdown.is_set():
            # To a router that started while this worker drains.
            link.send(pb.WorkerMessage(drained=pb.Drained()))


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
