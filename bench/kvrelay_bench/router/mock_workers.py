"""The mock workers' process: real Join streams, no model. One prefill and one decode worker.

The decode worker steps like an engine: every `step_s` one message with a token for each running
sequence. When a message arrived and when a token left is kept, in nanoseconds of the machine's
monotonic clock, which the client's process shares. Reads one JSON object from its arguments, runs
until its standard input ends, then writes what it saw to the file named there.
"""

import asyncio
import contextlib
import json
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from kvrelay_bench.router.loop import run
from kvrelay_bench.router.workload import Workload, answer_ids
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc
from kvrelay_protocol.outgoing import Outgoing, each
from kvrelay_protocol.versions import JOIN_VERSION

_MAX_QUEUED = 1 << 16
_BLOCKS = 1 << 24  # room is never what is measured here
_LAYOUT = pb.KvLayout(
    model_fingerprint="mock",
    dtype="bfloat16",
    block_size=16,
    num_layers=1,
    num_kv_heads=1,
    head_dim=64,
    protocol_version=1,
)


@dataclass
class Stamps:
    """When things happened, by request number."""

    submitted: dict[int, int] = field(default_factory=dict)
    """The worker that computes the prompt had its message."""
    answered: dict[int, int] = field(default_factory=dict)
    """The prefill worker's first token was handed to gRPC."""
    steps: list[int] = field(default_factory=list)
    """Every decode step was handed to gRPC."""
    joined: dict[int, tuple[int, int]] = field(default_factory=dict)
    """First decode step of a sequence, and the output index of its token there."""


class _Sequence:
    """One sequence on the decode worker."""

    __slots__ = ("end", "id", "ids", "next", "request")

    def __init__(self, sequence: pb.Sequence, ids: list[int]) -> None:
        self.id = sequence.sequence_id
        self.request = sequence.sampling.seed
        self.ids = ids
        self.next = 0
        self.end = sequence.max_tokens

    def run(self) -> pb.TokenRun:
        index = self.next
        self.next += 1
        last = self.next == self.end
        return pb.TokenRun(
            sequence_id=self.id,
            first_index=index,
            tokens=(self.ids[index],),
            finish=pb.FINISH_REASON_LENGTH if last else pb.FINISH_REASON_UNSPECIFIED,
        )


class _Worker:
    """One Join stream: messages in to `handle`, messages out of a queue."""

    def __init__(self, name: str, role: int, model: str) -> None:
        self.load = pb.Load(
            total_blocks=_BLOCKS, free_blocks=_BLOCKS, prefill_tokens_per_second=1e5
        )
        self._hello = pb.Hello(
            protocol_version=JOIN_VERSION,
            software_version="mock",
            worker_name=name,
            incarnation=secrets.randbits(64),
            role=role,  # type: ignore[arg-type]
            model=model,
            kv_layout=_LAYOUT,
            transport="inproc",
            transport_address=name.encode(),
            max_model_len=1 << 20,
            device="mock",
            load=self.load,
        )
        self._outgoing = Outgoing(pb.WorkerMessage, _MAX_QUEUED)
        self._stamps: list[Callable[[int], None]] = []
        """Of messages in line."""
        self._all_sent = asyncio.Event()
        self._all_sent.set()

    def send(self, message: pb.WorkerMessage, stamp: Callable[[int], None] | None = None) -> None:
        """Queue a message; `stamp` gets the time at which it is handed to gRPC."""
        self._all_sent.clear()
        if not self._outgoing.put(message):
            raise RuntimeError(f"the router left {_MAX_QUEUED} messages unread")
        if stamp is not None:
            self._stamps.append(stamp)

    async def sent(self) -> None:
        """Wait until everything queued was taken."""
        await self._all_sent.wait()

    async def serve(self, address: str, handle: Callable[[pb.RouterMessage, int], None]) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            call = fleet_pb2_grpc.FleetStub(channel).Join()
            await call.write(pb.WorkerMessage(hello=self._hello))
            tasks = [asyncio.create_task(self._write(call)), asyncio.create_task(self._beat())]
            try:
                async for message in call:
                    at = time.monotonic_ns()
                    each(message, lambda part, at=at: handle(part, at))  # type: ignore[misc]
            finally:
                for task in tasks:
                    task.cancel()

    async def _write(self, call: Any) -> None:
        while (message := await self._outgoing.next()) is not None:
            at = time.monotonic_ns()
            # All of them are in this message: a batch of mock messages is never too large for one.
            for stamp in self._stamps:
                stamp(at)
            self._stamps.clear()
            await call.write(message)
            if not len(self._outgoing):
                self._all_sent.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self.send(pb.WorkerMessage(heartbeat=pb.Heartbeat(load=self.load)))


class MockWorkers:
    """Both workers of a process; KV needs no transfer between them."""

    def __init__(self, workload: Workload, table: list[int], model: str) -> None:
        self.stamps = Stamps()
        self._workload = workload
        self._table = table
        self._prefill = _Worker("prefill-mock", pb.ROLE_PREFILL, model)
        self._decode = _Worker("decode-mock", pb.ROLE_DECODE, model)
        self._running: dict[int, _Sequence] = {}
        self._ready = asyncio.Event()
        self._opened = False
        self._waiting_for_kv: dict[int, _Sequence] = {}
        self._leased: dict[int, bool] = {}
        """Sequences on the prefill worker: whether their first token is out."""

    async def run(self, address: str) -> None:
        await asyncio.gather(
            self._prefill.serve(address, self._on_prefill),
            self._decode.serve(address, self._on_decode),
            self._step(),
        )

    # ---- prefill

    def _on_prefill(self, message: pb.RouterMessage, at: int) -> None:
        kind = message.WhichOneof("message")
        if kind == "submit_prefill":
            sequence = message.submit_prefill.sequence
            self.stamps.submitted[sequence.sampling.seed] = at
            loop = asyncio.get_running_loop()
            loop.call_later(self._workload.prefill_s, self._first_token, sequence)
        elif kind == "open_transfer":
            sequence_id = message.open_transfer.sequence_id
            if self._leased.get(sequence_id):
                self._transfer(sequence_id)
            else:
                self._leased[sequence_id] = False
        elif kind == "cancel":
            self._leased.pop(message.cancel.sequence_id, None)

    def _first_token(self, sequence: pb.Sequence) -> None:
        request, sequence_id = sequence.sampling.seed, sequence.sequence_id
        started = pb.SequenceStarted(sequence_id=sequence_id)
        self._prefill.send(pb.WorkerMessage(sequence_started=started))
        ids = answer_ids(self._table, request, 1)
        run = pb.TokenRun(sequence_id=sequence_id, first_index=0, tokens=ids)
        self._prefill.send(
            pb.WorkerMessage(step_output=pb.StepOutput(runs=[run])),
            lambda at: self.stamps.answered.update({request: at}),
        )
        if sequence_id in self._leased:
            self._transfer(sequence_id)
        else:
            self._leased[sequence_id] = True

    def _transfer(self, sequence_id: int) -> None:
        self._leased.pop(sequence_id, None)
        ready = self._waiting_for_kv.pop(sequence_id, None)
        if ready is None:  # cancelled: its first token was its last
            return
        self._prefill.send(pb.WorkerMessage(kv_sent=pb.KvSent(sequence_id=sequence_id)))
        self._decode.send(pb.WorkerMessage(kv_received=pb.KvReceived(sequence_id=sequence_id)))
        ready.next = 1
        if ready.end > 1:
            self._start(ready)

    # ---- decode

    def _on_decode(self, message: pb.RouterMessage, at: int) -> None:
        kind = message.WhichOneof("message")
        if kind == "cancel":
            self._running.pop(message.cancel.sequence_id, None)
            self._waiting_for_kv.pop(message.cancel.sequence_id, None)
        if kind != "submit_decode":
            return
        submit = message.submit_decode
        request = submit.sequence.sampling.seed
        ids = answer_ids(self._table, request, submit.sequence.max_tokens)
        sequence = _Sequence(submit.sequence, ids)
        if submit.expect_kv:
            self._waiting_for_kv[sequence.id] = sequence
            lease = pb.Lease(lease_id=secrets.token_bytes(16), tag=sequence.id)
            granted = pb.LeaseGranted(sequence_id=sequence.id, lease=lease)
            self._decode.send(pb.WorkerMessage(lease_granted=granted))
            return
        self.stamps.submitted[request] = at
        started = pb.SequenceStarted(sequence_id=sequence.id)
        self._decode.send(pb.WorkerMessage(sequence_started=started))
        self._start(sequence)

    def _start(self, sequence: _Sequence) -> None:
        self.stamps.joined[sequence.request] = (len(self.stamps.steps), sequence.next)
        self._running[sequence.id] = sequence
        self._opened = self._opened or len(self._running) >= self._workload.gate
        if self._opened:
            self._ready.set()

    async def _step(self) -> None:
        """One message per step with a token for every running sequence."""
        due = time.monotonic()
        while True:
            await self._ready.wait()
            if self._workload.step_s:
                # A late step is not made up for: an engine's isn't either.
                due = max(due + self._workload.step_s, time.monotonic())
                await asyncio.sleep(due - time.monotonic())
            else:
                await self._decode.sent()
            sequences = list(self._running.values())
            self.stamps.steps.append(0)
            runs = [sequence.run() for sequence in sequences]
            for sequence in sequences:
                if sequence.next == sequence.end:
                    del self._running[sequence.id]
            if not self._running:
                self._ready.clear()
            self._decode.send(
                pb.WorkerMessage(step_output=pb.StepOutput(runs=runs)),
                self._stamp_step(len(self.stamps.steps) - 1),
            )

    def _stamp_step(self, step: int) -> Callable[[int], None]:
        def stamp(at: int) -> None:
            self.stamps.steps[step] = at

        return stamp


async def _until_input_ends() -> None:
    await asyncio.to_thread(sys.stdin.read)


async def _serve(workers: MockWorkers, address: str) -> str:
    """Run until the input ends; returns what went wrong, if anything."""
    serving = asyncio.create_task(workers.run(address))
    ended = asyncio.create_task(_until_input_ends())
    await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
    failure = serving.exception() if serving.done() else None
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        await serving
    return "" if failure is None else f"{type(failure).__name__}: {failure}"


def main(given: dict[str, Any]) -> int:
    workers = MockWorkers(Workload(**given["workload"]), given["table"], given["model"])
    failure = run(_serve(workers, given["address"]))
    stamps = workers.stamps
    result = {
        "submitted": list(stamps.submitted.items()),
        "answered": list(stamps.answered.items()),
        "steps": stamps.steps,
        "joined": list(stamps.joined.items()),
    }
    Path(given["result"]).write_text(json.dumps(result))
    if failure:
        print(failure)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
