"""The decode worker: leases for arriving KV, local prefill, and the tokens of every sequence."""

import asyncio
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from opentelemetry.trace import Span, StatusCode

from kvrelay_decode.receiver import KvReceiver, Received
from kvrelay_decode.scheduler import (
    DecodeScheduler,
    LocalPrefillStarted,
    Reserved,
    TokenSampled,
)
from kvrelay_engine.batch import Batch, StepResult
from kvrelay_engine.runtime.host import WorkerHost
from kvrelay_engine.runtime.messages import (
    failure_message,
    spec_from_message,
    step_message,
    token_run,
)
from kvrelay_engine.runtime.ownership import compare, own_id, session_of, wire_id
from kvrelay_engine.sequence import SequenceFailed, SequenceSpec
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import ContextOverflow, KvrelayError, LeaseLost
from kvrelay_protocol.telemetry import Telemetry
from kvrelay_protocol.trace import TraceContext
from kvrelay_transfer.kit import TransferKit
from kvrelay_transfer.lease import LeaseId
from kvrelay_transfer.setup import message_from_layout
from kvrelay_transfer.ticket import new_ticket

_RATE_WEIGHT = 0.2
"""Of the last step in the average of prompt tokens per second."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sequence:
    """One sequence on this worker, from submit until it holds nothing here.

    While `transfer` runs, the transfer owns the sequence: whoever wants to end it cancels that task,
    at whose end nothing writes to the blocks any more.
    """

    spec: SequenceSpec
    lease_s: float
    submitted: float
    transfer: asyncio.Task[Received] | None = None
    receiver: KvReceiver | None = None
    renewed: bool = False
    """Its lease was renewed at least once."""
    cancelled: bool = False
    """Nobody waits for it: its transfer, under way, is being stopped."""
    span: Span | None = None
    """The phase that runs now: `prefill` (local) or `decode`."""
    tokens: int = 0


@dataclass(slots=True)
class DecodeWorker:
    """Glue between routers, scheduler and receivers. Lives on the event loop's thread but for `step`.

    Sequences go by their own ids (`ownership.py`).
    """

    host: WorkerHost
    kit: TransferKit
    scheduler: DecodeScheduler
    telemetry: Telemetry
    _sequences: dict[int, _Sequence] = field(default_factory=dict)
    _progress: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever a sequence ends."""
    _corrupt_frames: int = 0
    _foreign_frames: int = 0
    _expired_leases: int = 0
    _let_go: int = 0
    _bandwidth: float = 0.0
    _tokens_per_second: float = 0.0
    """Of steps that are mostly prompt: what this worker does where there is no prefill worker. Engine thread."""

    @property
    def open_sequences(self) -> int:
        return len(self._sequences)

    async def wait_idle(self) -> None:
        while self._sequences:
            self._progress.clear()
            await self._progress.wait()

    def handle(self, message: pb.RouterMessage, session: int = 0) -> None:
        match message.WhichOneof("message"):
            case "submit_decode":
                self._submit(message.submit_decode, session)
            case "cancel":
                self._cancel(own_id(session, message.cancel.sequence_id), message.cancel.reason)
            case "all_sent":
                sequence = self._sequences.get(own_id(session, message.all_sent.sequence_id))
                if sequence and sequence.receiver is not None and sequence.transfer is not None:
                    sequence.receiver.all_sent()
            case other:
                log.warning("a decode worker got %s from the router; ignored", other)

    def pulse(self, pulse: pb.Pulse, session: int = 0) -> list[int]:
        difference = compare(pulse, session, self._sequences)
        orphans = [own for own in difference.orphans if not self._sequences[own].cancelled]
        if orphans:
            log.warning("let go of %d sequences that their router does not have", len(orphans))
            self._let_go += len(orphans)
        for own in orphans:
            self._cancel(own, "the router does not have it")
        for own in difference.going:
            self._renew(self._sequences[own])
        for own in difference.stalled:
            # A lease's time runs from its first renewal.
            if not self._sequences[own].renewed:
                self._renew(self._sequences[own])
        return [wire_id(own) for own in difference.unknown]

    @staticmethod
    def _renew(sequence: _Sequence) -> None:
        if sequence.receiver is not None and sequence.transfer is not None:
            sequence.receiver.renew()
            sequence.renewed = True

    def step(self, batch: Batch) -> StepResult:
        """One engine step. Engine thread."""
        begun = time.monotonic()
        result = self.host.engine.runner.step(batch)
        prompt_tokens = sum(len(part.tokens) for part in batch.slices if len(part.tokens) > 1)
        if 2 * prompt_tokens > batch.num_tokens:
            rate = batch.num_tokens / max(time.monotonic() - begun, 1e-6)
            before = self._tokens_per_second or rate
            self._tokens_per_second = before + _RATE_WEIGHT * (rate - before)
        return result

    def events(self, events: Sequence[object]) -> None:
        runs: defaultdict[int, list[pb.TokenRun]] = defaultdict(list)  # by session
        for event in events:
            match event:
                case TokenSampled():
                    runs[session_of(event.sequence_id)] += self._token(event)
                case Reserved():
                    self._reserved(event)
                case LocalPrefillStarted():
                    self._local_prefill(event)
                case SequenceFailed():
                    self._failed(event)
        for session, some in runs.items():
            if some:
                self.host.send(step_message(some), session)

    def drop(self, session: int, reason: str) -> None:
        for sequence_id in list(self._sequences):
            if session_of(sequence_id) == session:
                self._cancel(sequence_id, reason)

    def drop_all(self, reason: str) -> None:
        for sequence_id in list(self._sequences):
            self._cancel(sequence_id, reason)

    def add_load(self, load: pb.Load) -> None:
        load.corrupt_frames = self._corrupt_frames
        load.foreign_frames = self._foreign_frames
        load.expired_leases = self._expired_leases
        load.let_go = self._let_go
        load.open_transfers = sum(s.transfer is not None for s in self._sequences.values())
        load.transport_bandwidth = self._bandwidth
        load.prefill_tokens_per_second = self._tokens_per_second

    def _submit(self, message: pb.SubmitDecode, session: int) -> None:
        spec = spec_from_message(message.sequence, session)
        if spec.sequence_id in self._sequences:
            log.error("sequence %d was submitted twice; the second is ignored", spec.sequence_id)
            return
        try:
            self._check(spec)
        except KvrelayError as error:
            self.host.send(failure_message(spec.sequence_id, error), session)
            return
        lease_s = message.lease_seconds or self.host.config.lease_s
        self._sequences[spec.sequence_id] = _Sequence(spec, lease_s, time.monotonic())
        enter = self.scheduler.reserve if message.expect_kv else self.scheduler.submit
        self.host.post(lambda: enter(spec))

    def _check(self, spec: SequenceSpec) -> None:
        engine = self.host.engine
        spec.check(engine.runner.config.vocab_size)
        if len(spec.tokens) + spec.max_tokens > engine.max_model_len:
            raise ContextOverflow(
                f"{len(spec.tokens)} tokens and {spec.max_tokens} to generate; "
                f"this decode worker holds {engine.max_model_len}",
            )

    def _cancel(self, sequence_id: int, reason: str) -> None:
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return
        if sequence.transfer is not None:
            sequence.cancelled = True
            sequence.transfer.cancel(reason)
            return
        if sequence.span is not None:
            sequence.span.add_event("cancelled", {"reason": reason})
        self._forget(sequence)
        self.host.post(lambda: self.scheduler.abort(sequence_id))

    def _forget(self, sequence: _Sequence) -> None:
        """It holds nothing here any more, or nothing that the scheduler was not told to free."""
        del self._sequences[sequence.spec.sequence_id]
        self._end_span(sequence)
        self._progress.set()

    def _reserved(self, event: Reserved) -> None:
        sequence = self._sequences.get(event.sequence_id)
        if sequence is None:  # cancelled meanwhile; the abort is behind the reservation
            return
        identity = LeaseId(secrets.token_bytes(16), self.host.incarnation, event.generation)
        ticket, tag = new_ticket(), secrets.randbits(64)
        size = self.kit.layout.block_size
        receiver = KvReceiver(
            identity,
            ticket=ticket,
            tag=tag,
            spec=sequence.spec,
            prompt_blocks=event.blocks[: -(-len(sequence.spec.tokens) // size)],
            first_block=event.first_block,
            kit=self.kit,
            pool=self.host.engine.runner.pool,
            lease_s=sequence.lease_s,
            deadline=sequence.submitted + sequence.spec.deadline_s,
            on_posted=lambda: self._grant(event, identity, tag, ticket),
            on_missing=lambda numbers: self._ask_again(event.sequence_id, numbers),
        )
        sequence.receiver = receiver
        sequence.transfer = asyncio.get_running_loop().create_task(receiver.run())
        # A callback, since a task that is cancelled before its first turn runs nothing of its own.
        sequence.transfer.add_done_callback(
            lambda task: self._transfer_ended(sequence, receiver, task),
        )

    def _grant(self, event: Reserved, identity: LeaseId, tag: int, ticket: bytes) -> None:
        self.host.send(
            pb.WorkerMessage(
                lease_granted=pb.LeaseGranted(
                    sequence_id=wire_id(event.sequence_id),
                    lease=pb.Lease(
                        lease_id=identity.lease_id,
                        epoch=identity.epoch,
                        generation=identity.generation,
                        tag=tag,
                        transport_address=self.kit.transport.address,
                        worker_name=self.host.config.name,
                        first_block=event.first_block,
                        max_message_bytes=self.kit.staging.nbytes,
                        ticket=ticket,
                        kv_layout=message_from_layout(self.kit.layout),
                    ),
                ),
            ),
            session_of(event.sequence_id),
        )

    def _ask_again(self, sequence_id: int, numbers: tuple[int, ...]) -> None:
        missing = pb.KvMissing(sequence_id=wire_id(sequence_id), messages=numbers)
        self.host.send(pb.WorkerMessage(kv_missing=missing), session_of(sequence_id))

    def _transfer_ended(
        self, sequence: _Sequence, receiver: KvReceiver, task: asyncio.Task[Received]
    ) -> None:
        """Nothing writes to the reserved blocks any more: run on them, or free them."""
        self._corrupt_frames += receiver.lease.corrupt_frames
        self._foreign_frames += receiver.lease.foreign_frames
        receiver.lease.release()
        sequence.transfer = None
        sequence_id = sequence.spec.sequence_id
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None and not sequence.cancelled:
            self._transfer_done(sequence, task.result())
            return
        if isinstance(error, Exception) and not sequence.cancelled:
            self._transfer_failed(sequence, error)
        self._forget(sequence)
        self.host.post(lambda: self.scheduler.abort(sequence_id))

    def _transfer_failed(self, sequence: _Sequence, error: Exception) -> None:
        if not isinstance(error, KvrelayError):
            log.error("receiving KV of request %s failed", sequence.spec.request_id, exc_info=error)
        if isinstance(error, LeaseLost):
            self._expired_leases += 1
        self._say_failed(sequence.spec.sequence_id, error)

    def _transfer_done(self, sequence: _Sequence, received: Received) -> None:
        spec, handover = sequence.spec, received.handover
        self._bandwidth = received.bytes / max(received.seconds, 1e-9)
        self._transfer_span(sequence, received)
        sequence.span = self._phase_span(sequence, "decode", received.prefill_trace)
        self.host.send(
            pb.WorkerMessage(
                kv_received=pb.KvReceived(
                    sequence_id=wire_id(spec.sequence_id),
                    bytes=received.bytes,
                    messages=received.messages,
                    seconds=received.seconds,
                    exposed_seconds=received.exposed_seconds,
                    transport=handover.transport,
                ),
            ),
            session_of(spec.sequence_id),
        )
        self.host.post(lambda: self.scheduler.start(spec.sequence_id, handover.first_token))

    def _local_prefill(self, event: LocalPrefillStarted) -> None:
        sequence = self._sequences.get(event.sequence_id)
        if sequence is None:
            return
        sequence.span = self._phase_span(sequence, "prefill", None)
        sequence.span.set_attribute("kvrelay.cached_tokens", event.cached_tokens)
        self.host.send(
            pb.WorkerMessage(
                sequence_started=pb.SequenceStarted(
                    sequence_id=wire_id(event.sequence_id),
                    cached_tokens=event.cached_tokens,
                    queue_seconds=time.monotonic() - sequence.submitted,
                ),
            ),
            session_of(event.sequence_id),
        )

    def _failed(self, event: SequenceFailed) -> None:
        sequence = self._sequences.get(event.sequence_id)
        if sequence is None:
            return
        if sequence.span is not None:
            sequence.span.set_attribute("error.type", event.error.code)
            sequence.span.set_status(StatusCode.ERROR)
        self._forget(sequence)
        self._say_failed(event.sequence_id, event.error)

    def _say_failed(self, sequence_id: int, error: BaseException) -> None:
        self.host.send(failure_message(sequence_id, error), session_of(sequence_id))

    def _token(self, event: TokenSampled) -> list[pb.TokenRun]:
        sequence = self._sequences.get(event.sequence_id)
        if sequence is None:  # cancelled while the step ran
            return []
        sequence.tokens += 1
        local_prefill_ends = sequence.receiver is None and sequence.tokens == 1
        if local_prefill_ends and event.finish is None and sequence.span is not None:
            sequence.span.end()
            sequence.span = self._phase_span(sequence, "decode", None)
        if event.finish is not None:
            self._forget(sequence)
        return [token_run(event.sequence_id, event.index, event.token, event.finish)]

    # ---- spans: all are children of the router's root, so that no lost worker can orphan another's

    def _phase_span(self, sequence: _Sequence, name: str, link: TraceContext | None) -> Span:
        return self.telemetry.start_span(
            name,
            parent=TraceContext.parse(sequence.spec.traceparent),
            links=[link] if link is not None else [],
            attributes={
                "kvrelay.worker": self.host.config.name,
                "kvrelay.prompt_tokens": len(sequence.spec.tokens),
            },
        )

    def _transfer_span(self, sequence: _Sequence, received: Received) -> None:
        prefill = received.prefill_trace
        span = self.telemetry.start_span(
            "kv_transfer",
            parent=TraceContext.parse(sequence.spec.traceparent),
            start_ns=received.first_ns,
            links=[prefill] if prefill is not None else [],
            attributes={
                "kvrelay.worker": self.host.config.name,
                "kvrelay.kv.bytes": received.bytes,
                "kvrelay.kv.messages": received.messages,
                "kvrelay.kv.transport": received.handover.transport,
                "kvrelay.kv.gigabytes_per_second": received.bytes
                / max(received.seconds, 1e-9)
                / 1e9,
                "kvrelay.kv.exposed_ms": received.exposed_seconds * 1e3,
            },
        )
        if span.is_recording():
            for event in received.events:
                span.add_event("kv_message", event.attributes, event.arrived.at_ns)
        span.end()

    @staticmethod
    def _end_span(sequence: _Sequence) -> None:
        if sequence.span is None:
            return
        sequence.span.set_attribute("kvrelay.output_tokens", sequence.tokens)
        sequence.span.end()
        sequence.span = None
