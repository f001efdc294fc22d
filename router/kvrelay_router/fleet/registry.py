"""Who has joined: admission of workers, their loss, and the word about both to the request service."""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import InvalidRequest, LayoutMismatch, Unauthorized
from kvrelay_protocol.incoming import MessageMissing
from kvrelay_protocol.versions import JOIN_VERSION
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.slumber import Rest
from kvrelay_router.fleet.worker_link import WorkerLink, role_of
from kvrelay_router.requests.placement import Role, WorkerState

MAX_NAME_LENGTH = 128
MIN_SILENCE_S = 3.0
"""A busy machine may delay a heartbeat; below this silence is not a sign of anything."""
MISSED_HEARTBEATS = 3
MIN_WITNESSED_SILENCE_S = 1.2
"""The same while another worker of the role is heard: so it is neither the machine nor this router, and
there is somebody to take over."""
WITNESSED_MISSED_HEARTBEATS = 4
MIN_QUIET_S = 0.8
"""A worker that is silent for so long, or for `QUIET_HEARTBEATS`, gets no work that another one can do."""
QUIET_HEARTBEATS = 2.5
LAYOUT_FIELDS = (
    "model_fingerprint",
    "num_layers",
    "num_kv_heads",
    "head_dim",
    "protocol_version",
)
"""What two workers must have in common to exchange KV."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartingWorker:
    """What a worker said last that is on its way."""

    name: str
    role: Role
    phase: str
    done: int
    """Bytes of the phase, where it counts them; else 0."""
    total: int
    elapsed_s: float
    """Since its process started."""


class FleetListener(Protocol):
    """Who hears about workers. Called on the event loop; must neither block nor raise."""

    def worker_joined(self, link: WorkerLink) -> None: ...

    def worker_lost(self, link: WorkerLink, why: str) -> None:
        """The link is out of the registry already."""

    def worker_starting(self, starting: StartingWorker) -> None:
        """A worker that can't take work yet says how far it is."""

    def worker_message(self, link: WorkerLink, message: pb.WorkerMessage) -> None:
        """Anything but hello; a heartbeat's load is in `link.load` already."""

    def worker_rests(self, link: WorkerLink) -> None:
        """A worker falls asleep, sleeps, wakes up or is awake again: see `link.slumber`."""

    def message_repeated(self, link: WorkerLink) -> None:
        """A message came twice, and was dropped."""

    def message_missing(self, link: WorkerLink) -> None:
        """A message was lost on its way; `worker_lost` comes next."""


class WorkerRegistry:
    """The joined workers by name. All methods run on one event loop and none of them waits."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.listener: FleetListener | None = None
        self.closing = False
        """The router itself ends; that workers go is no news then."""
        self._config = config
        self._clock = clock
        self._links: dict[str, WorkerLink] = {}
        self._starting: dict[str, tuple[object, StartingWorker]] = {}
        self._last_sweep = clock()

    @property
    def links(self) -> tuple[WorkerLink, ...]:
        return tuple(self._links.values())

    def get(self, name: str) -> WorkerLink | None:
        return self._links.get(name)

    def states(self) -> list[WorkerState]:
        """Of the workers that are awake: the others have no load and take none."""
        quiet_since = self._clock() - self.quiet_limit_s
        return [k.state(quiet_since=quiet_since) for k in self._links.values() if k.awake]

    @property
    def starting(self) -> tuple[StartingWorker, ...]:
        """Workers that said they start and have not joined."""
        return tuple(worker for _call, worker in self._starting.values())

    def starts(self, message: pb.Starting, call: object) -> None:
        """Note how far a worker is; who heard it says `starts_no_more` when its call ends.

        Args: `call` tells it from the call of another process of the same name.

        Raises:
            Unauthorized, InvalidRequest, LayoutMismatch: it could not join.
        """
        self.check_identity(message)
        if message.worker_name in self._links:
            return  # a late word of one that has joined meanwhile
        worker = StartingWorker(
            message.worker_name,
            role_of(message.role),
            message.phase,
            message.done,
            message.total,
            message.elapsed_seconds,
        )
        self._starting[worker.name] = (call, worker)
        if self.listener:
            self.listener.worker_starting(worker)

    def starts_no_more(self, name: str, call: object) -> None:
        """Its call ended: it is about to join, or gone."""
        if name in self._starting and self._starting[name][0] is call:
            del self._starting[name]

    def check_identity(self, said: pb.Hello | pb.Starting | pb.WeightsWanted) -> None:
        """Whether who says this may speak as a worker of this router.

        Raises:
            Unauthorized: wrong join token.
            InvalidRequest: no name or no role.
            LayoutMismatch: another protocol or model.
        """
        expected, given = self._config.join_token.encode(), said.join_token.encode()
        if expected and not hmac.compare_digest(expected, given):
            raise Unauthorized("join_token: not the one this router was started with")
        if not 0 < len(said.worker_name) <= MAX_NAME_LENGTH:
            raise InvalidRequest(
                f"worker_name: needs 1 to {MAX_NAME_LENGTH} characters, has {len(said.worker_name)}",
            )
        if said.role not in {pb.ROLE_PREFILL, pb.ROLE_DECODE}:
            raise InvalidRequest(f"role: {said.role} is neither prefill nor decode")
        _same("protocol_version", said.protocol_version, JOIN_VERSION, "the router")
        _same("model", said.model, self._config.model_name, "the router")

    def join(self, hello: pb.Hello) -> WorkerLink:
        """Admit a worker; one of the same name is replaced and counts as lost.

        Raises:
            Unauthorized: wrong join token.
            InvalidRequest: no name or no role.
            LayoutMismatch: it could not work with the router or with the workers already here.
        """
        self._check(hello)
        previous = self._links.get(hello.worker_name)
        if previous is not None:
            self.lose(previous, f"replaced by incarnation {hello.incarnation:016x}")
        link = WorkerLink(hello, now=self._clock())
        self._links[link.name] = link
        self._starting.pop(link.name, None)
        logger.info("worker %s joined as %s", link.name, link.role.value)
        if self.listener:
            self.listener.worker_joined(link)
        return link

    def lose(self, link: WorkerLink, why: str) -> None:
        """Take a worker out and tell the listener at once. Idempotent."""
        if link.lost.done():
            return
        link.lost.set_result(why)
        if self._links.get(link.name) is link:
            del self._links[link.name]
        level = logging.INFO if link.draining or self.closing else logging.WARNING
        logger.log(level, "worker %s lost: %s", link.name, why)
        if self.listener:
            self.listener.worker_lost(link, why)

    def send(self, name: str, message: pb.RouterMessage) -> None:
        """Queue a message for a worker; one that can't keep up is given up."""
        link = self._links.get(name)
        if link is None or link.overflowed:
            return
        if not link.send(message):
            # Not from within the listener's own call: the caller is in the middle of its work.
            asyncio.get_running_loop().call_soon(
                self.lose,
                link,
                "it does not read its messages",
            )

    def sleep(self, link: WorkerLink) -> None:
        """Give a worker no more work, and have it sleep as soon as it has none: call it again until then.

        One that has work all the same, of another router say, stays awake and says so.
        """
        before = link.slumber.rest
        link.slumber.retire()
        self._order(link, before, None if link.attempts else link.slumber.sleep())

    def wake(self, link: WorkerLink) -> None:
        """Have a worker that sleeps, or is about to, take work again."""
        before = link.slumber.rest
        self._order(link, before, link.slumber.wake())

    def _order(self, link: WorkerLink, before: Rest, order: pb.RouterMessage | None) -> None:
        if order is not None:
            self.send(link.name, order)
        if self.listener and link.slumber.rest is not before:
            self.listener.worker_rests(link)

    def written(self, link: WorkerLink, message: pb.WorkerMessage) -> None:
        """What a joined worker wrote: one message or a batch, numbered.

        A worker that lost one on the way is given up, as if its stream had broken.
        """
        try:
            fresh = link.incoming.take(message, lambda part: self.received(link, part))
        except MessageMissing as missing:
            if self.listener:
                self.listener.message_missing(link)
            self.lose(link, str(missing))
            return
        if not fresh and self.listener:
            self.listener.message_repeated(link)

    def received(self, link: WorkerLink, message: pb.WorkerMessage) -> None:
        """A message of a joined worker; any counts as a sign of life."""
        if link.lost.done():
            return
        link.last_seen = self._clock()
        kind = message.WhichOneof("message")
        if kind == "heartbeat":
            link.report(message.heartbeat.load, now=link.last_seen)
        elif kind == "drained":
            link.draining = True
        elif kind == "sleep_state":
            if link.slumber.told(message.sleep_state) and self.listener:
                self.listener.worker_rests(link)
            return
        if self.listener:
            self.listener.worker_message(link, message)

    @property
    def silence_limit_s(self) -> float:
        """After so long without a message a worker is given up."""
        return max(MIN_SILENCE_S, MISSED_HEARTBEATS * self._config.heartbeat_s)

    @property
    def witnessed_limit_s(self) -> float:
        """The same while another worker of its role is heard."""
        missed = WITNESSED_MISSED_HEARTBEATS * self._config.heartbeat_s
        return min(max(MIN_WITNESSED_SILENCE_S, missed), self.silence_limit_s)

    @property
    def quiet_limit_s(self) -> float:
        return max(MIN_QUIET_S, QUIET_HEARTBEATS * self._config.heartbeat_s)

    def sweep(self) -> None:
        """Give up workers that fell silent (a stopped process keeps its connection)."""
        now = self._clock()
        pause, self._last_sweep = now - self._last_sweep, now
        if pause > self.witnessed_limit_s / 2:
            # It was this process that slept: what the workers sent meanwhile is still unread.
            for link in self._links.values():
                link.last_seen = now
            return
        heard = {link.role for link in self.links if now - link.last_seen < self.quiet_limit_s}
        for link in self.links:
            silent = now - link.last_seen
            witnessed = link.role in heard
            if silent > (self.witnessed_limit_s if witnessed else self.silence_limit_s):
                self.lose(link, f"no sign of life for {silent:.1f} s")

    def _check(self, hello: pb.Hello) -> None:
        self.check_identity(hello)
        for link in self._links.values():
            if link.name == hello.worker_name:
                continue  # about to be replaced
            _same("transport", hello.transport, link.transport, link.name)
            for field in LAYOUT_FIELDS:
                mine, theirs = getattr(hello.kv_layout, field), getattr(link.kv_layout, field)
                _same(f"kv_layout.{field}", mine, theirs, link.name)
            _note_dtype(hello, link)
            break  # all that joined are equal in these


def _note_dtype(hello: pb.Hello, link: WorkerLink) -> None:
    """Workers of two dtypes exchange KV, but an answer then depends on which of them gave it."""
    mine, theirs = hello.kv_layout.dtype, link.kv_layout.dtype
    if mine != theirs:
        logger.warning(
            "worker %s computes in %s, %s in %s: an answer that moves between them is not exact",
            hello.worker_name,
            mine,
            link.name,
            theirs,
        )


def _same(field: str, worker: object, other: object, whose: str) -> None:
    if worker != other:
        raise LayoutMismatch(f"{field}: this worker has {worker!r}, {whose} has {other!r}")
