"""Test support: a scriptable worker that dials the real Join stream and computes nothing.

Its answer to a prompt is `answer(prompt)[i]` at output index i, whatever worker or attempt produces it,
so that a test can compare a replayed stream with an undisturbed one. KV "travels" through a shared
`FakeFabric` instead of a transport.

    fabric = FakeFabric()
    async with FakeWorker(port, "d0", "decode", fabric) as decode, FakeWorker(...):
        ...
        decode.die()          # the stream breaks
        decode.freeze()       # alive but silent, as after SIGSTOP
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import grpc
import grpc.aio

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc
from kvrelay_protocol.incoming import Incoming
from kvrelay_protocol.outgoing import Outgoing
from kvrelay_protocol.versions import JOIN_VERSION

BLOCK_SIZE = 16
LAYOUT = pb.KvLayout(
    model_fingerprint="fake",
    dtype="float32",
    block_size=BLOCK_SIZE,
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    protocol_version=1,
)
_ROLES = {"prefill": pb.ROLE_PREFILL, "decode": pb.ROLE_DECODE}


def answer_token(prompt: Sequence[int], index: int) -> int:
    """The output token every fake worker gives at `index` after `prompt`."""
    return (sum(prompt) * 31 + index * 7) % 50_000


def answer(prompt: Sequence[int], length: int) -> tuple[int, ...]:
    return tuple(answer_token(prompt, i) for i in range(length))


@dataclass
class FakeFabric:
    """Hands the "KV" of a lease from a prefill to a decode worker of the same process."""

    arrived: dict[bytes, asyncio.Event] = field(default_factory=dict)

    def lease(self) -> bytes:
        lease_id = secrets.token_bytes(16)
        self.arrived[lease_id] = asyncio.Event()
        return lease_id


@dataclass
class Script:
    """How a fake worker behaves. Change it at any time."""

    step_s: float = 0.0
    """Pause before each token."""
    hold_lease: bool = False
    """Never grant a lease (a full decode worker)."""
    hold_prefill: bool = False
    """Take the prompt and never answer."""
    missing_rounds: int = 0
    """Claim corrupt KV frames this often per sequence."""
    fail: pb.Error | None = None
    """Fail every sequence at once."""
    stop_after: int | None = None
    """Output index whose token is the end-of-sequence token."""
    pause_at_index: int | None = None
    """Stop for good just before the token of this output index: the moment for `die`."""
    obey_cancel: bool = True
    obey_rest: bool = True
    """Sleep when it is told to and nothing is open; wake up."""
    forget: int = 0
    """Take this many sequences and know nothing of them from then on."""


class FakeWorker:
    """One worker. `seen` holds every router message in order, `open` the sequences it still holds."""

    def __init__(
        self,
        port: int,
        name: str,
        role: str,
        fabric: FakeFabric | None = None,
        *,
        script: Script | None = None,
        heartbeat_s: float = 0.2,
        change_hello: Callable[[pb.Hello], None] | None = None,
        blocks: int = 1000,
    ) -> None:
        self.name = name
        self.script = script or Script()
        self.seen: list[pb.RouterMessage] = []
        self.open: set[int] = set()
        self.refused: pb.Error | None = None
        self.closed = asyncio.Event()
        """The stream is over, whoever ended it."""
        self.pulses: list[pb.Pulse] = []
        self.load = pb.Load(total_blocks=blocks, free_blocks=blocks, prefill_tokens_per_second=1000)
        self.hello = pb.Hello(
            protocol_version=JOIN_VERSION,
            software_version="0",
            worker_name=name,
            incarnation=secrets.randbits(64),
            role=_ROLES[role],
            model="demo",
            kv_layout=LAYOUT,
            transport="inproc",
            transport_address=name.encode(),
            max_model_len=4096,
            device="fake",
            load=self.load,
        )
        if change_hello:
            change_hello(self.hello)
        self._fabric = fabric or FakeFabric()
        self._heartbeat_s = heartbeat_s
        self._outgoing = Outgoing(pb.WorkerMessage, 1 << 16)
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._call: grpc.aio.StreamStreamCall | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._sequences: dict[int, asyncio.Task[None]] = {}
        self._transfers: dict[int, asyncio.Queue[pb.Lease]] = {}
        self._resends: dict[int, asyncio.Queue[tuple[int, ...]]] = {}
        self._forgotten: set[int] = set()
        self._frozen = False
        self._welcome = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._call = fleet_pb2_grpc.FleetStub(self._channel).Join(self._requests())
        self._spawn(self._receive())
        self._spawn(self._heartbeats())
        await asyncio.wait_for(self._welcome.wait(), 60)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.die()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    # ---- what a test does to it

    def die(self) -> None:
        """Break the stream, as a killed process does."""
        if self._call is not None:
            self._call.cancel()
        for task in self._tasks:
            task.cancel()
        self.closed.set()

    def freeze(self) -> None:
        """Keep the connection and say nothing more, as a stopped process does."""
        self._frozen = True

    def send(self, message: pb.WorkerMessage) -> None:
        if not self._frozen:
            self._outgoing.put(message)

    def report(self, **fields: int) -> None:
        """Send a heartbeat with these load fields changed from now on."""
        for name, value in fields.items():
            setattr(self.load, name, value)
        live = self.pulses[-1].live if self.pulses else ()
        unknown = [sid for sid in live if sid in self._forgotten]
        self.send(pb.WorkerMessage(heartbeat=pb.Heartbeat(load=self.load, unknown=unknown)))

    def kinds(self) -> list[str]:
        """Which messages came, welcome and pulses left out."""
        return [k for k in map(_kind, self.seen) if k != "welcome"]

    def messages(self, kind: str) -> list[object]:
        return [getattr(m, kind) for m in self.seen if _kind(m) == kind]

    async def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)

    # ---- the worker

    async def _requests(self) -> AsyncIterator[pb.WorkerMessage]:
        yield pb.WorkerMessage(hello=self.hello)
        while (message := await self._outgoing.next()) is not None:
            yield message

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            self.report()

    async def _receive(self) -> None:
        assert self._call is not None
        incoming = Incoming()
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for message in self._call:
                if self._frozen:
                    continue
                if message.WhichOneof("message") in {"welcome", "refused"}:
                    self._obey(message)
                else:
                    incoming.take(message, self._obey)
        for task in self._sequences.values():
            task.cancel()
        self.open.clear()
        self.closed.set()
        self._welcome.set()

    def _obey(self, message: pb.RouterMessage) -> None:
        if _kind(message) == "pulse":
            self.pulses.append(message.pulse)
            return
        self.seen.append(message)
        match _kind(message):
            case "welcome":
                self._welcome.set()
            case "refused":
                self.refused = message.refused.error
                self._welcome.set()
            case "submit_prefill":
                self._begin(message.submit_prefill.sequence, self._prefill)
            case "submit_decode":
                submit = message.submit_decode
                self._begin(submit.sequence, self._decode_kv if submit.expect_kv else self._decode)
            case "open_transfer":
                opened = message.open_transfer
                self._queue(self._transfers, opened.sequence_id).put_nowait(opened.lease)
            case "resend_kv":
                resend = message.resend_kv
                self._queue(self._resends, resend.sequence_id).put_nowait(tuple(resend.messages))
            case "release_kv":
                self._end(message.release_kv.sequence_id)
            case "sleep" | "wake" as kind if self.script.obey_rest:
                self._rest(kind == "sleep", getattr(message, kind).order)
            case "cancel" if self.script.obey_cancel:
                self._end(message.cancel.sequence_id)
            case _:
                pass

    def _rest(self, asleep: bool, order: int) -> None:
        state = pb.SleepState(asleep=asleep and not self.open, order=order)
        self.send(pb.WorkerMessage(sleep_state=state))

    def _begin(self, sequence: pb.Sequence, work: Callable[[pb.Sequence], object]) -> None:
        if self.script.forget:
            self.script.forget -= 1
            self._forgotten.add(sequence.sequence_id)
            return
        self.open.add(sequence.sequence_id)
        if self.script.fail is not None:
            self._fail(sequence.sequence_id, self.script.fail)
            return
        self._sequences[sequence.sequence_id] = self._spawn(work(sequence))

    def _end(self, sequence_id: int) -> None:
        self.open.discard(sequence_id)
        task = self._sequences.pop(sequence_id, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def _fail(self, sequence_id: int, error: pb.Error) -> None:
        failed = pb.SequenceFailed(sequence_id=sequence_id, error=error)
        self.send(pb.WorkerMessage(sequence_failed=failed))
        self._end(sequence_id)

    async def _prefill(self, sequence: pb.Sequence) -> None:
        sid = sequence.sequence_id
        if self.script.hold_prefill:
            return
        self._started(sid)
        await self._token(sequence, sequence.output_offset)
        lease = await self._queue(self._transfers, sid).get()
        while True:
            size = 64 * len(sequence.tokens)
            sent = pb.KvSent(
                sequence_id=sid,
                bytes=size,
                messages=3,
                seconds=0.001,
                prefill_seconds=0.002,
                transport="inproc",
            )
            self.send(pb.WorkerMessage(kv_sent=sent))
            self._fabric.arrived[lease.lease_id].set()
            await self._queue(self._resends, sid).get()

    async def _decode_kv(self, sequence: pb.Sequence) -> None:
        sid = sequence.sequence_id
        if self.script.hold_lease:
            return
        lease = pb.Lease(lease_id=self._fabric.lease(), epoch=self.hello.incarnation, tag=sid)
        arrived = self._fabric.arrived[lease.lease_id]
        granted = pb.LeaseGranted(sequence_id=sid, lease=lease)
        self.send(pb.WorkerMessage(lease_granted=granted))
        for _ in range(self.script.missing_rounds):
            await arrived.wait()
            arrived.clear()
            missing = pb.KvMissing(sequence_id=sid, messages=[1])
            self.send(pb.WorkerMessage(kv_missing=missing))
        await arrived.wait()
        received = pb.KvReceived(
            sequence_id=sid,
            bytes=64 * len(sequence.tokens),
            messages=3,
            seconds=0.001,
            exposed_seconds=0.0005,
            transport="inproc",
        )
        self.send(pb.WorkerMessage(kv_received=received))
        await self._generate(sequence, sequence.output_offset + 1)

    async def _decode(self, sequence: pb.Sequence) -> None:
        self._started(sequence.sequence_id)
        await self._generate(sequence, sequence.output_offset)

    async def _generate(self, sequence: pb.Sequence, first: int) -> None:
        for index in range(first, sequence.output_offset + sequence.max_tokens):
            if await self._token(sequence, index):
                break
        self._end(sequence.sequence_id)

    async def _token(self, sequence: pb.Sequence, index: int) -> int:
        """Send the token of one output index; returns its finish reason (0: go on)."""
        await asyncio.sleep(self.script.step_s)
        if index == self.script.pause_at_index:
            await asyncio.Event().wait()
        prompt = sequence.tokens[: len(sequence.tokens) - sequence.output_offset]
        finish = pb.FINISH_REASON_UNSPECIFIED
        if index + 1 == sequence.output_offset + sequence.max_tokens:
            finish = pb.FINISH_REASON_LENGTH
        if index == self.script.stop_after:
            finish = pb.FINISH_REASON_STOP
        run = pb.TokenRun(
            sequence_id=sequence.sequence_id,
            first_index=index,
            tokens=[answer_token(prompt, index)],
            finish=finish,
        )
        self.send(pb.WorkerMessage(step_output=pb.StepOutput(runs=[run])))
        return int(finish)

    def _started(self, sequence_id: int) -> None:
        started = pb.SequenceStarted(sequence_id=sequence_id, cached_tokens=16)
        self.send(pb.WorkerMessage(sequence_started=started))

    def _queue(self, queues: dict[int, asyncio.Queue], sid: int) -> asyncio.Queue:
        return queues.setdefault(sid, asyncio.Queue())

    def _spawn(self, work: object) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        return task


def _kind(message: pb.RouterMessage) -> str:
    return message.WhichOneof("message") or ""
