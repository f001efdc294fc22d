"""A whole deployment in one thread: real router, real workers, and every order of events a test chooses.

What can happen next is a list of *moves*, each of them one indivisible turn: a message is delivered, an
engine takes half a step, a copy is made, a KV message gets one stage further. Whoever drives the world picks
from the list, breaks things in between, and after every move everything that must hold is checked.
"""

import asyncio
import contextlib
import logging
import random
import secrets
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from prometheus_client import CollectorRegistry
from simulated.engine import STOP, answer_to
from simulated.fabric import Fabric, Flight, Stage
from simulated.loop import VirtualLoop
from simulated.workers import TELEMETRY, SimWorker, Stream

from kvrelay_protocol.errors import InternalError, KvrelayError
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_router.config import RouterConfig
from kvrelay_router.requests.core import RouterCore
from kvrelay_router.requests.types import (
    Failed,
    Finished,
    FinishReason,
    RequestEvent,
    RequestStream,
    Tokens,
    ValidRequest,
)
from kvrelay_transfer.digest import digest
from kvrelay_transfer.frames import HEADER_SIZE
from kvrelay_transfer.lease import LeaseId

TOKENS = 24
"""In each pool: two or three sequences at once."""
BEAT_S = 0.25
QUIET_S = 15.0
"""Of virtual time after the last fault: a lease for each of four attempts, and the waits for a place."""
MAX_MOVES = 4000
"""Until a world without new faults must be quiet."""
CONFIG = RouterConfig(
    model_dir=Path("unused"),
    model_name="sim",
    max_replays=3,
    replay_wait_s=2.0,
    queue_timeout_s=5.0,
    lease_s=1.0,
)
_REPLACED_IN = (
    "kvrelay_decode.",
    "kvrelay_prefill.",
    "kvrelay_router.requests.",
    "kvrelay_router.fleet.",
    "kvrelay_transfer.",
)


@dataclass(eq=False)
class Client:
    """One request and what came of it."""

    prompt: tuple[int, ...]
    max_tokens: int
    stream: RequestStream
    cancelled: bool = False
    events: list[RequestEvent] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [i for e in self.events if isinstance(e, Tokens) for i in e.ids]

    @property
    def ended(self) -> bool:
        return any(isinstance(e, Finished | Failed) for e in self.events)

    def check(self) -> None:
        """At most one end, tokens of the undisturbed run only, and all of them in a success."""
        right = answer_to(self.prompt, self.max_tokens)
        assert self.tokens == right[: len(self.tokens)], (self.tokens, right)
        ends = [e for e in self.events if isinstance(e, Finished | Failed)]
        if not ends:
            return
        (end,) = ends
        assert end is self.events[-1]
        if isinstance(end, Finished):
            assert self.tokens == right, (self.tokens, right)
            stopped = right[-1] == STOP
            assert end.reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
        else:
            assert isinstance(end.error, KvrelayError)
            assert not isinstance(end.error, InternalError), end.error


class World:
    """Router and workers `P`, `Q` (prefill), `D`, `E` (decode)."""

    def __init__(self, prefill: str = "P", decode: str = "D", decode_block: int = 2) -> None:
        self._block_size = {"prefill": 2, "decode": decode_block}
        self.loop = VirtualLoop()
        self.fabric = Fabric()
        self.clients: list[Client] = []
        self.streams: list[Stream] = []
        self.workers: dict[str, SimWorker] = {}
        self._graves: list[SimWorker] = []
        self._incarnations = iter(range(1, 1000))
        self._between: list[int] = []
        self._exit = contextlib.ExitStack()
        self._exit.enter_context(_deterministic(self.loop))
        self._exit.enter_context(self.loop)
        self._exit.enter_context(_errors_are_defects(self.loop))
        self.core = RouterCore(CONFIG, TELEMETRY, metrics_registry=CollectorRegistry())
        for name in prefill:
            self.start("prefill", name)
        for name in decode:
            self.start("decode", name)

    # ---- what happens by itself

    def moves(self) -> list[Callable[[], object]]:
        """Everything that may happen next, in a stable order."""
        found: list[Callable[[], object]] = [
            lambda stream=stream: self._to_router(stream) for stream in self.streams if stream.up
        ]
        for worker in self._awake():
            if worker.stream is None:
                found.append(lambda worker=worker: self._join(worker))
            elif worker.stream.cut:
                found.append(worker.notice_cut)
            elif worker.stream.down:
                found.append(worker.hear)
            if worker.steps.runnable:
                found.append(worker.steps.turn)
        return found + self._kv_moves()

    def _awake(self) -> list[SimWorker]:
        return [worker for worker in self.workers.values() if not worker.asleep]

    def _kv_moves(self) -> list[Callable[[], object]]:
        copies = [w.copies.run for w in self._awake() if w.copies.jobs]
        still = {worker.transport for worker in self.workers.values() if worker.asleep}
        flights = [
            lambda flight=flight: self.fabric.move(flight)
            for flight in self.fabric.movable()
            if flight.target not in still and (flight.source not in still or flight.can_end)
        ]
        return [*copies, *flights]

    def go(self, choices: list[int], until: Callable[[], object] = lambda: False) -> None:
        """Make one move per choice; end early where what was waited for is there."""
        for choice in choices:
            if until():
                return
            moves = self.moves()
            if not moves:
                return
            # While a step computes its layers, what was computed is on its way already.
            self._between = [choice // 7] * (choice // len(moves) % 4)
            moves[choice % len(moves)]()
            self.settle()

    def wait(self, seconds: float) -> None:
        """Time passes, and workers report meanwhile; reports wait for their turn to be heard."""
        end = self.loop.now + seconds
        while self.loop.now < end:
            self.loop.advance(min(BEAT_S, end - self.loop.now))
            for worker in self.workers.values():
                worker.beat()
            self.core.registry.sweep()
            self.settle()

    def settle(self) -> None:
        """Let the loop run dry, and look at everything."""
        self.loop.settle()
        for stream in self.streams:
            if stream.link.lost.done():
                stream.break_off()
        self.check()

    def _between_layers(self) -> None:
        self.loop.settle()
        for choice in self._between:
            if moves := self._kv_moves():
                moves[choice % len(moves)]()
                self.loop.settle()

    def _to_router(self, stream: Stream) -> None:
        message = stream.up.popleft()
        if message is None:
            self.core.registry.lose(stream.link, "its stream ended")
            self.streams.remove(stream)
        else:
            self.core.registry.received(stream.link, message)

    def _join(self, worker: SimWorker) -> None:
        self.streams.append(worker.join(self.core.registry))

    # ---- what is done to it

    def start(self, role: str, name: str) -> None:
        """A new process under a name, at the address that the last one of this name had."""
        worker = SimWorker(
            role,
            name,
            next(self._incarnations),
            loop=self.loop,
            fabric=self.fabric,
            num_blocks=TOKENS // self._block_size[role],
            block_size=self._block_size[role],
            between_layers=self._between_layers,
        )
        self.workers[name] = worker
        self._join(worker)
        self.settle()

    def kill(self, name: str) -> None:
        """Kill a worker and start the next one of its name."""
        worker = self.workers[name]
        worker.die()
        self._graves.append(worker)
        self.start(worker.role, name)

    def sleep(self, name: str) -> None:
        """SIGSTOP: it keeps everything and does nothing."""
        self.workers[name].asleep = True

    def wake(self) -> None:
        """SIGCONT for all."""
        for worker in self.workers.values():
            worker.asleep = False

    def cut(self, name: str) -> None:
        """Break its stream; either side notices when its turn comes."""
        stream = self.workers[name].stream
        if stream is not None:
            stream.break_off()

    def submit(self, prompt: tuple[int, ...], max_tokens: int, salt: bytes = b"") -> Client:
        request = ValidRequest(
            request_id=f"request-{len(self.clients)}",
            model="sim",
            prompt_tokens=prompt,
            sampling=SamplingParams(temperature=0.0),
            max_tokens=max_tokens,
            stop_token_ids=frozenset({STOP}),
            deadline_s=100.0,
            cache_salt=salt,
        )
        client = Client(prompt, max_tokens, self.core.service.submit(request))
        self.clients.append(client)
        self.loop.create_task(_read(client))
        self.settle()
        return client

    def hurry(self, flight: Flight) -> None:
        """Everything that can happen to this message happens before anything else."""
        while flight in self.fabric.movable():
            self.fabric.move(flight)
            self.settle()

    def renamed(self, frame: bytes, tag: int) -> bytes:
        """A recorded frame under the names of the lease that waits with this tag, without its key."""
        (identity,) = [
            sequence.receiver.lease.identity
            for worker in self.workers.values()
            if worker.role == "decode"
            for sequence in worker.worker._sequences.values()
            if sequence.receiver is not None and sequence.receiver._tag == tag
        ]
        return renamed(frame, identity)

    def cancel(self, client: Client) -> None:
        client.cancelled = True
        client.stream.cancel("gone")
        self.settle()

    def flights(self) -> list[Flight]:
        """What workers have sent and nobody writes anywhere yet."""
        early = (Stage.FLYING, Stage.WAITING)
        own = {worker.transport for worker in self.workers.values()}
        return [f for f in self.fabric.flights if f.source in own and f.stage in early]

    def lose_message(self, flight: Flight) -> None:
        """It is gone, and its sender does not know."""
        self.fabric.drop(flight)
        self.settle()

    def receiving(self) -> bool:
        """Whether somewhere a message is being written, or waits to be copied into its blocks."""
        stages = {flight.stage for flight in self.fabric.flights}
        decoding = [w for w in self.workers.values() if w.role == "decode"]
        return bool(stages & {Stage.MATCHED, Stage.HALF}) or any(w.copies.jobs for w in decoding)

    def client_amid(self, which: int) -> Client | None:
        """One whose KV is being received."""
        amid = [
            int(sequence.spec.request_id.removeprefix("request-"))
            for worker in self.workers.values()
            if worker.role == "decode"
            for sequence in worker.worker._sequences.values()
            if sequence.transfer is not None
        ]
        return self.clients[amid[which % len(amid)]] if amid else None

    def waiting_receives(self) -> list[tuple[bytes, int]]:
        """Address and tag of every receive that is posted."""
        return [
            (worker.transport.address, tag)
            for worker in self.workers.values()
            for tag in worker.transport.mailbox.posted
        ]

    def repeat_report(self, name: str, which: int) -> None:
        """A worker says again what it said once in this session."""
        worker = self.workers[name]
        if worker.stream is not None and worker.said:
            self.core.registry.received(
                worker.stream.link, worker.said[-1 - which % len(worker.said)]
            )
            self.settle()

    # ---- what must hold

    def check(self) -> None:
        assert not self.loop.defects, self.loop.defects
        for worker in self.workers.values():
            worker.check()
        for client in self.clients:
            client.check()

    def quiesce(self) -> None:
        """Nothing new goes wrong: soon everything has ended, and everything is given back."""
        self.wake()
        self._run_dry()
        begun = self.loop.now
        while not self._quiet():
            waited = self.loop.now - begun
            assert waited < QUIET_S, f"not quiet after {waited:g} s"
            self.wait(BEAT_S)
            self._run_dry()
        for worker in self.workers.values():
            worker.check_idle()
        assert not self.core.service._placing.running

    def _quiet(self) -> bool:
        open_sequences = any(worker.worker.open_sequences for worker in self.workers.values())
        return not open_sequences and all(client.ended for client in self.clients)

    def _run_dry(self) -> None:
        for number in range(MAX_MOVES):
            moves = self.moves()
            if not moves:
                return
            moves[number % len(moves)]()
            self.settle()
        raise AssertionError(f"not quiet after {MAX_MOVES} moves")

    def close(self) -> None:
        """End every task, of the dead too."""
        self.loop.set_exception_handler(lambda *_: None)
        for worker in [*self.workers.values(), *self._graves]:
            worker.transport.die()
        for _ in range(20):
            tasks = asyncio.all_tasks(self.loop)
            if not tasks:
                break
            for worker in [*self.workers.values(), *self._graves]:
                while worker.copies.jobs:
                    worker.copies.jobs.popleft()[1].cancel()
            for flight in list(self.fabric.flights):
                self.fabric.lose(flight, "over")
            for task in tasks:
                task.cancel()
            self.loop.settle()
        self._exit.close()


def forged(frame: bytes) -> bytes:
    """Another payload under the same header, every digest right that needs no key."""
    data = bytearray(frame)
    data[-1] ^= 64
    data[88:105] = digest(bytes(data[HEADER_SIZE:])) + b"\0"
    data[144:160] = digest(bytes(data[:144]))
    return bytes(data)


def renamed(frame: bytes, identity: LeaseId) -> bytes:
    """A recorded frame under other names, whole to everybody who has no key."""
    data = bytearray(frame)
    data[8:36] = struct.pack("<16sQI", identity.lease_id, identity.epoch, identity.generation)
    data[144:160] = digest(bytes(data[:144]))
    return bytes(data)


async def _read(client: Client) -> None:
    async for event in client.stream:
        client.events.append(event)


@contextlib.contextmanager
def _deterministic(loop: VirtualLoop) -> Iterator[None]:
    """The code under test asks this loop for the time, and draws the same ids in every world."""
    rng = random.Random(0)
    ids = SimpleNamespace(
        randbits=rng.getrandbits,
        token_bytes=rng.randbytes,
        token_hex=lambda nbytes: rng.randbytes(nbytes).hex(),
    )
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if not name.startswith(_REPLACED_IN):
                continue
            for real, stand_in in ((time, loop.clock()), (secrets, ids)):
                if getattr(module, real.__name__, None) is real:
                    stack.enter_context(mock.patch.object(module, real.__name__, stand_in))
        yield


@contextlib.contextmanager
def _errors_are_defects(loop: VirtualLoop) -> Iterator[None]:
    """What the code under test logs as an error is a defect of it."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            cause = record.exc_info[1] if record.exc_info else ""
            loop.defects.append(f"{record.getMessage()} {cause!r}")

    handler = Handler(logging.ERROR)
    loggers = [logging.getLogger(f"kvrelay_{part}") for part in ("decode", "prefill", "router")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
