"""The real workers, around a simulated engine, transport and Join stream."""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from simulated.engine import (
    FINGERPRINT,
    MAX_MODEL_LEN,
    CheckedPool,
    SimRunner,
    SimStepLoop,
    layout_of,
)
from simulated.fabric import Fabric, SimTransport
from simulated.loop import CopyThread, VirtualLoop

from kvrelay_decode.scheduler import DecodeScheduler
from kvrelay_decode.worker import DecodeWorker
from kvrelay_engine.cache.allocator import BlockAllocator
from kvrelay_engine.runtime.messages import load_message
from kvrelay_engine.runtime.ownership import own_id
from kvrelay_prefill.scheduler import PrefillScheduler
from kvrelay_prefill.worker import PrefillWorker
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.telemetry import Telemetry
from kvrelay_protocol.versions import JOIN_VERSION
from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.fleet.worker_link import WorkerLink
from kvrelay_transfer.kit import TransferKit
from kvrelay_transfer.setup import layout_from_message
from kvrelay_transfer.staging import StagingBuffers

STAGING_BUFFERS = 2
STAGING_BYTES = 160 + 6 * 128
"""Six tokens of both layers: a prompt takes several messages."""
TELEMETRY = Telemetry("simulated", instance="simulated")


@dataclass(eq=False)
class Stream:
    """One Join stream: two queues, each in order. `None` upward is its end as the router sees it."""

    link: WorkerLink
    session: int
    """What the worker calls it."""
    up: deque[pb.WorkerMessage | None] = field(default_factory=deque)
    down: deque[pb.RouterMessage] = field(default_factory=deque)
    cut: bool = False
    """The worker has still to notice."""

    def put(self, message: pb.RouterMessage) -> bool:
        """Stands in for the link's `Outgoing`."""
        if not self.cut:
            copy = pb.RouterMessage()
            copy.CopyFrom(message)
            self.down.append(copy)
        return True

    def close(self) -> None:
        pass

    def break_off(self) -> None:
        """What is under way downwards is lost; upwards it comes, and then the end."""
        if not self.cut:
            self.cut = True
            self.down.clear()
            self.up.append(None)


class SimWorker:
    """One worker process; also the `WorkerHost` of the worker inside."""

    def __init__(
        self,
        role: str,
        name: str,
        incarnation: int,
        *,
        loop: VirtualLoop,
        fabric: Fabric,
        num_blocks: int,
        block_size: int,
        between_layers: Any,
    ) -> None:
        self.role = role
        self.name = name
        self.incarnation = incarnation
        self.loop = loop
        self.layout = layout_of(block_size)
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.pool = CheckedPool(self.allocator, loop.defects)
        self.runner = SimRunner(self.pool, between_layers)
        self.config = SimpleNamespace(name=name, lease_s=10.0)
        self.engine = SimpleNamespace(
            runner=self.runner,
            allocator=self.allocator,
            max_model_len=MAX_MODEL_LEN,
            kv_layout=self.layout,
            fingerprint=FINGERPRINT,
        )
        # The same address after every restart: the worst a network can do.
        self.transport = SimTransport(fabric, f"sim:{name}".encode())
        fabric.listening[self.transport.address] = self.transport
        self.staging = StagingBuffers(STAGING_BUFFERS, STAGING_BYTES, self.transport.allocate)
        self.transport.staging = self.staging
        self.copies = CopyThread()
        self.kit = TransferKit(
            self.transport, self.staging, layout_from_message(self.layout), self.copies
        )
        make_scheduler = PrefillScheduler if role == "prefill" else DecodeScheduler
        self.scheduler: Any = make_scheduler(
            self.allocator,
            fingerprint=FINGERPRINT,
            max_batch_tokens=4,
            max_sequences=4,
        )
        make_worker = PrefillWorker if role == "prefill" else DecodeWorker
        self.worker: Any = make_worker(self, self.kit, self.scheduler, TELEMETRY)
        step = self.worker.step if role == "prefill" else self.runner.step
        self.steps = SimStepLoop(
            self.scheduler,
            step,
            on_events=self._deliver,
            on_failure=lambda error: None,
        )
        self.stream: Stream | None = None
        self._sessions = itertools.count()
        self._unknown: Sequence[int] = ()
        self.dead = False
        self.asleep = False
        self.said: list[pb.WorkerMessage] = []
        """Everything about sequences that was ever said, for whoever repeats it."""

    # ---- what the worker needs of a `WorkerHost`

    def post(self, command: Any) -> None:
        self.steps.post(command)

    def send(self, message: pb.WorkerMessage, session: int) -> None:
        if self.dead or self.stream is None or self.stream.session != session:
            return
        if not self.stream.cut:
            self.stream.up.append(message)
            if message.WhichOneof("message") != "heartbeat":
                self.said.append(message)

    def _deliver(self, events: Any) -> None:
        if not self.dead:
            self.loop.call_soon_threadsafe(self.worker.events, events)

    # ---- the stream

    def join(self, registry: WorkerRegistry) -> Stream:
        role = pb.ROLE_PREFILL if self.role == "prefill" else pb.ROLE_DECODE
        hello = pb.Hello(
            protocol_version=JOIN_VERSION,
            worker_name=self.name,
            incarnation=self.incarnation,
            role=role,
            model="sim",
            kv_layout=self.layout,
            transport="sim",
            transport_address=self.transport.address,
            max_model_len=MAX_MODEL_LEN,
            device="cpu",
            load=self.load(),
        )
        stream = self.stream = Stream(registry.join(hello), next(self._sessions))
        stream.link._outgoing = stream
        return stream

    def load(self) -> pb.Load:
        load = load_message(self.steps.load)
        self.worker.add_load(load)
        return load

    def beat(self) -> None:
        if self.stream is not None and not self.asleep:
            heartbeat = pb.Heartbeat(load=self.load(), unknown=self._unknown)
            self.send(pb.WorkerMessage(heartbeat=heartbeat), self.stream.session)
            self._unknown = ()

    def hear(self) -> None:
        """The next message from the router."""
        assert self.stream is not None
        message = self.stream.down.popleft()
        kind, session = message.WhichOneof("message"), self.stream.session
        if kind == "pulse":
            self._unknown = self.worker.pulse(message.pulse, session)
            return
        if kind in ("submit_prefill", "submit_decode"):
            sequence = getattr(message, kind).sequence
            self.runner.submitted(own_id(session, sequence.sequence_id), sequence)
        self.worker.handle(message, session)

    def notice_cut(self) -> None:
        assert self.stream is not None
        session, self.stream, self._unknown = self.stream.session, None, ()
        self.worker.drop(session, "the router is gone")

    def die(self) -> None:
        """SIGKILL: nothing of it runs any more, and what it had sent may still arrive."""
        self.dead = True
        self.transport.die()
        if self.stream is not None:
            self.stream.down.clear()
            self.stream.up.append(None)

    # ---- what must hold

    def check(self) -> None:
        """Every block in one state and with an owner; every staging buffer free or held."""
        self.allocator.check_integrity()
        self.staging.check_integrity()
        # Streams lose nothing here: nothing may be left for a pulse to find.
        assert self.worker._let_go == 0, f"{self.name} held what its router had given up"
        pending = not self.steps._commands.empty() or self.steps.running is not None
        for sequence_id in self._holding():
            owned = sequence_id in self._open()
            assert owned or pending, f"{self.name}: nobody owns the blocks of {sequence_id:x}"
        held = [block for blocks in self._holding().values() for block in blocks]
        counts = self.allocator.counts
        assert counts.leased + counts.in_use == len(set(held)), (self.name, counts, held)

    def check_idle(self) -> None:
        """Nothing is open, and every block and buffer is back."""
        counts = self.allocator.counts
        assert counts.free + counts.cached == counts.total, (self.name, counts)
        assert not self._open(), (self.name, self._open())
        assert self.staging.free == STAGING_BUFFERS, (self.name, self.staging.free)
        assert not self.transport.mailbox.posted, self.name
        # Strangers, and senders to an earlier process here, may knock with tags nobody gave out.
        left = self.transport.mailbox.waiting.keys() & self.transport.tags
        assert not left, (self.name, left)

    def _open(self) -> Any:
        return self.worker._prompts if self.role == "prefill" else self.worker._sequences

    def _holding(self) -> dict[int, list[int]]:
        """Blocks by sequence."""
        scheduler = self.scheduler
        if self.role == "prefill":
            states = {**scheduler._computing, **scheduler._held}
            return {key: list(state.blocks) for key, state in states.items()}
        leased = {k: list(lease.allocation.blocks) for k, lease in scheduler._leased.items()}
        return leased | {k: list(state.blocks) for k, state in scheduler._running.items()}
