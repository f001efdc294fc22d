"""Either worker without router, engine thread or model: a test is all three, one turn at a time.

Everything a worker says is in `sent`; what it posts for the engine thread waits in `commands` until
`turn`. So any interleaving of messages, events and steps can be written down exactly.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from kvrelay_decode.scheduler import DecodeScheduler
from kvrelay_decode.worker import DecodeWorker
from kvrelay_engine.batch import Batch, StepResult
from kvrelay_engine.cache.allocator import BlockAllocator
from kvrelay_engine.cache.pool import KVPool
from kvrelay_kernels.cpu.library import cpu_library
from kvrelay_prefill.scheduler import PrefillScheduler
from kvrelay_prefill.worker import PrefillWorker
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.telemetry import Telemetry
from kvrelay_transfer.inproc import InprocTransport
from kvrelay_transfer.kit import TransferKit
from kvrelay_transfer.layout import KvLayout, Piece
from kvrelay_transfer.staging import StagingBuffers

BLOCK = 4
BLOCKS = 16
VOCABULARY = 100
TOKEN = 7
"""What the engine that a test stands for samples, always."""
LAYOUT = KvLayout("model", "float32", BLOCK, num_layers=2, num_kv_heads=1, head_dim=2)
MODEL = SimpleNamespace(num_layers=2, num_kv_heads=1, head_dim=2, vocab_size=VOCABULARY)

Worker = PrefillWorker | DecodeWorker


@dataclass
class Host:
    """The part of `WorkerHost` that workers use."""

    pool: KVPool
    lease_s: float = 5.0
    incarnation: int = 1
    sent: list[pb.WorkerMessage] = field(default_factory=list)
    sessions: list[int] = field(default_factory=list)
    """Whose router each message of `sent` was for."""
    commands: deque[Callable[[], None]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        runner = SimpleNamespace(pool=self.pool, config=MODEL)
        self.engine = SimpleNamespace(runner=runner, max_model_len=BLOCK * BLOCKS)
        self.config = SimpleNamespace(name="worker", lease_s=self.lease_s)

    def post(self, command: Callable[[], None]) -> None:
        self.commands.append(command)

    def send(self, message: pb.WorkerMessage, session: int) -> None:
        self.sent.append(message)
        self.sessions.append(session)

    def named(self, kind: str) -> list:
        """What was sent of this kind."""
        return [getattr(m, kind) for m in self.sent if m.WhichOneof("message") == kind]


class Bench:
    """One worker and its surroundings."""

    def __init__(self, worker: Worker, host: Host) -> None:
        self.worker, self.host, self.scheduler = worker, host, worker.scheduler
        self.say_written = True

    def run_commands(self) -> None:
        while self.host.commands:
            self.host.commands.popleft()()

    def turn(self, step: Callable[[Batch], StepResult] | None = None) -> Batch | None:
        """One turn of the engine thread, its events delivered at once."""
        self.run_commands()
        batch = self.scheduler.schedule()
        self.worker.events(self.scheduler.take_events())
        if batch is not None:
            self._written(batch)
            self.scheduler.commit(batch, (step or sample)(batch))
            self.worker.events(self.scheduler.take_events())
        self.scheduler.check_integrity()
        return batch

    def _written(self, batch: Batch) -> None:
        """What the engine's `layers_done` reports, all layers at once."""
        if self.say_written and isinstance(self.worker, PrefillWorker):
            for part in batch.slices:
                piece = Piece(0, LAYOUT.num_layers, part.start, len(part.tokens))
                self.worker._written([(part.sequence_id, piece)])

    async def stopped(self) -> None:
        """Everything is given back: blocks, staging buffers, book-keeping."""
        async with asyncio.timeout(60):
            await self.worker.wait_idle()
        self.run_commands()
        counts = self.scheduler.allocator.counts
        assert counts.free + counts.cached == counts.total, counts
        assert self.worker.kit.staging.held == 0
        assert self.worker.open_sequences == 0

    async def close(self) -> None:
        await self.worker.kit.close()
        self.worker.telemetry.shutdown()


def sample(batch: Batch) -> StepResult:
    return StepResult({s.sequence_id: TOKEN for s in batch.slices if s.sampling is not None})


async def bench(kind: type[Worker], *, blocks: int = BLOCKS, staging: int = 4) -> Bench:
    """A bare worker of this class; `close` it."""
    cpu_library()  # as a worker's start does; it may compile, longer than any test's time limit
    transport = InprocTransport()
    await transport.start()
    pool = KVPool(
        MODEL, num_blocks=blocks, block_size=BLOCK, device=torch.device("cpu"), dtype=torch.float32
    )
    host = Host(pool)
    allocator = BlockAllocator(blocks, BLOCK)
    scheduler = PrefillScheduler if kind is PrefillWorker else DecodeScheduler
    worker = kind(
        host,
        TransferKit(transport, StagingBuffers(staging, 4096), LAYOUT),
        scheduler(allocator, fingerprint="model", max_batch_tokens=64, max_sequences=64),
        Telemetry("test", instance="worker"),
    )
    return Bench(worker, host)


def sequence(sequence_id: int, length: int = 6, **fields: object) -> pb.Sequence:
    tokens = [(sequence_id * 10 + n) % VOCABULARY for n in range(length)]
    defaults = {"tokens": tokens, "max_tokens": 5, "deadline_seconds": 60.0}
    return pb.Sequence(sequence_id=sequence_id, request_id="r", **(defaults | fields))


def submit_prefill(sequence_id: int, length: int = 6, **fields: object) -> pb.RouterMessage:
    whole = sequence(sequence_id, length, **fields)
    return pb.RouterMessage(submit_prefill=pb.SubmitPrefill(sequence=whole))


def submit_decode(
    sequence_id: int,
    length: int = 6,
    *,
    expect_kv: bool = True,
    lease_s: float = 5.0,
    **fields: object,
) -> pb.RouterMessage:
    whole = sequence(sequence_id, length, **fields)
    submit = pb.SubmitDecode(sequence=whole, expect_kv=expect_kv, lease_seconds=lease_s)
    return pb.RouterMessage(submit_decode=submit)


def cancel(sequence_id: int) -> pb.RouterMessage:
    return pb.RouterMessage(cancel=pb.Cancel(sequence_id=sequence_id, reason="test"))


def release(sequence_id: int) -> pb.RouterMessage:
    return pb.RouterMessage(release_kv=pb.ReleaseKv(sequence_id=sequence_id))


def resend(sequence_id: int, *messages: int) -> pb.RouterMessage:
    return pb.RouterMessage(resend_kv=pb.ResendKv(sequence_id=sequence_id, messages=messages))


def open_transfer(granted: pb.LeaseGranted) -> pb.RouterMessage:
    opened = pb.OpenTransfer(sequence_id=granted.sequence_id, lease=granted.lease)
    return pb.RouterMessage(open_transfer=opened)


async def until(condition: Callable[[], object]) -> None:
    """Let tasks run until the condition holds."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)
