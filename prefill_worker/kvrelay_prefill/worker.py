"""The prefill worker: prompts from the router to the scheduler, their KV to decode workers."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from opentelemetry.trace import Span, StatusCode

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
from kvrelay_prefill.scheduler import Admitted, FirstToken, PrefillScheduler
from kvrelay_prefill.sender import FirstOutput, KvSender, Sent
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import ContextOverflow, KvrelayError, LayoutMismatch
from kvrelay_protocol.telemetry import Telemetry, context_of
from kvrelay_protocol.trace import TraceContext
from kvrelay_transfer.kit import TransferKit
from kvrelay_transfer.layout import Piece, group_layers
from kvrelay_transfer.lease import LeaseId, OpenLease
from kvrelay_transfer.setup import layout_from_message

log = logging.getLogger(__name__)

_RATE_WEIGHT = 0.2
"""Share of the newest step in the measured prefill rate."""


@dataclass(slots=True)
class _Prompt:
    """One sequence on this worker, from submit until its sender has ended."""

    spec: SequenceSpec
    sender: KvSender
    task: asyncio.Task[None]
    submitted: float
    admitted: float = 0.0
    prefill_s: float = 0.0
    cached_tokens: int = 0
    ending: bool = False
    """Nobody waits for it: only its sender is still to end."""
    span: Span | None = None


@dataclass(slots=True)
class PrefillWorker:
    """Glue between routers, scheduler and senders. Lives on the event loop's thread but for `step`.

    Sequences go by their own ids (`ownership.py`).
    """

    host: WorkerHost
    kit: TransferKit
    scheduler: PrefillScheduler
    telemetry: Telemetry
    _prompts: dict[int, _Prompt] = field(default_factory=dict)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _tokens_per_second: float = 0.0
    _bandwidth: float = 0.0
    _computed_tokens: int = 0
    """Written by the engine thread alone."""
    _let_go: int = 0

    @property
    def open_sequences(self) -> int:
        return len(self._prompts)

    async def wait_idle(self) -> None:
        while self._prompts:
            self._idle.clear()
            await self._idle.wait()

    def handle(self, message: pb.RouterMessage, session: int = 0) -> None:
        def named(sequence_id: int) -> _Prompt | None:
            return self._prompts.get(own_id(session, sequence_id))

        match message.WhichOneof("message"):
            case "submit_prefill":
                self._submit(spec_from_message(message.submit_prefill.sequence, session))
            case "open_transfer":
                if prompt := named(message.open_transfer.sequence_id):
                    self._open(prompt, message.open_transfer.lease)
            case "resend_kv":
                if prompt := named(message.resend_kv.sequence_id):
                    prompt.sender.resend(list(message.resend_kv.messages))
            case "release_kv":
                if prompt := named(message.release_kv.sequence_id):
                    self._release(prompt)
            case "cancel":
                if prompt := named(message.cancel.sequence_id):
                    self._cancel(prompt, message.cancel.reason)
            case other:
                log.warning("a prefill worker got %s from the router; ignored", other)

    def pulse(self, pulse: pb.Pulse, session: int = 0) -> list[int]:
        difference = compare(pulse, session, self._prompts)
        orphans = [p for own in difference.orphans if not (p := self._prompts[own]).ending]
        if orphans:
            log.warning("let go of %d prompts that their router does not have", len(orphans))
            self._let_go += len(orphans)
        for prompt in orphans:
            self._cancel(prompt, "the router does not have it")
        return [wire_id(own) for own in difference.unknown]

    def step(self, batch: Batch) -> StepResult:
        """One engine step; hands each layer group over as soon as it is written. Engine thread."""
        begun = time.monotonic()

        def layers_done(first: int, end: int) -> None:
            pieces = [
                (part.sequence_id, Piece(first, end - first, part.start, len(part.tokens)))
                for part in batch.slices
            ]
            self._loop.call_soon_threadsafe(self._written, pieces)

        result = self.host.engine.runner.step(
            batch,
            layers_done,
            group_layers(self.kit.layout, max(len(part.tokens) for part in batch.slices)),
        )
        rate = batch.num_tokens / max(time.monotonic() - begun, 1e-6)
        self._computed_tokens += batch.num_tokens
        self._tokens_per_second += _RATE_WEIGHT * (rate - self._tokens_per_second)
        return result

    def events(self, events: Sequence[object]) -> None:
        runs: defaultdict[int, list[pb.TokenRun]] = defaultdict(list)  # by session
        for event in events:
            match event:
                case Admitted():
                    self._admitted(event)
                case FirstToken():
                    runs[session_of(event.sequence_id)] += self._first_token(event)
                case SequenceFailed():
                    self._failed(event)
        for session, some in runs.items():
            if some:
                self.host.send(step_message(some), session)

    def drop(self, session: int, reason: str) -> None:
        for sequence_id, prompt in self._prompts.items():
            if session_of(sequence_id) == session:
                self._cancel(prompt, reason)

    def drop_all(self, reason: str) -> None:
        for prompt in self._prompts.values():
            self._cancel(prompt, reason)

    def add_load(self, load: pb.Load) -> None:
        load.prefill_tokens_per_second = self._tokens_per_second
        load.open_transfers = len(self._prompts)
        load.transport_bandwidth = self._bandwidth
        load.computed_tokens = self._computed_tokens
        load.let_go = self._let_go

    def _submit(self, spec: SequenceSpec) -> None:
        if spec.sequence_id in self._prompts:
            log.error("sequence %d was submitted twice; the second is ignored", spec.sequence_id)
            return
        try:
            self._check(spec)
        except KvrelayError as error:
            self._say_failed(spec, error)
            return
        sender = KvSender(
            spec,
            self.kit,
            self.host.engine.runner.pool,
            lease_s=self.host.config.lease_s,
            on_sent=lambda sent: self._sent(spec.sequence_id, sent),
        )
        task = self._loop.create_task(sender.run())
        prompt = self._prompts[spec.sequence_id] = _Prompt(spec, sender, task, time.monotonic())
        # A callback, since a task that is cancelled before its first turn runs nothing of its own.
        task.add_done_callback(lambda _: self._ended(prompt))
        self.host.post(lambda: self.scheduler.submit(spec))

    def _check(self, spec: SequenceSpec) -> None:
        engine = self.host.engine
        spec.check(engine.runner.config.vocab_size)
        if len(spec.tokens) > engine.max_model_len:
            raise ContextOverflow(
                f"prompt of {len(spec.tokens)} tokens; this prefill worker holds "
                f"{engine.max_model_len}",
            )

    def _ended(self, prompt: _Prompt) -> None:
        """The sender reads no block any more, however it ended: they are free."""
        spec, task = prompt.spec, prompt.task
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            if not isinstance(error, KvrelayError):
                log.error("sending KV of request %s failed", spec.request_id, exc_info=error)
            self._say_failed(spec, error)
        if prompt.span is not None:
            _end(prompt.span, error)
        del self._prompts[spec.sequence_id]
        self.host.post(lambda: self.scheduler.release(spec.sequence_id))
        self._idle.set()

    def _say_failed(self, spec: SequenceSpec, error: BaseException) -> None:
        session = session_of(spec.sequence_id)
        self.host.send(failure_message(spec.sequence_id, error), session)

    def _open(self, prompt: _Prompt, lease: pb.Lease) -> None:
        try:
            layout = layout_from_message(lease.kv_layout)
        except LayoutMismatch as error:
            prompt.sender.fail(error)
            return
        prompt.sender.open(
            OpenLease(
                identity=LeaseId(lease.lease_id, lease.epoch, lease.generation),
                tag=lease.tag,
                address=lease.transport_address,
                first_block=lease.first_block,
                max_message_bytes=min(lease.max_message_bytes, self.kit.staging.nbytes),
                layout=layout,
                ticket=lease.ticket,
            ),
        )

    @staticmethod
    def _release(prompt: _Prompt) -> None:
        prompt.ending = True
        prompt.sender.release()

    @staticmethod
    def _cancel(prompt: _Prompt, reason: str) -> None:
        prompt.ending = True
        prompt.task.cancel(reason)

    def _written(self, pieces: list[tuple[int, Piece]]) -> None:
        for sequence_id, piece in pieces:
            if prompt := self._prompts.get(sequence_id):
                prompt.sender.written(piece)

    def _admitted(self, event: Admitted) -> None:
        prompt = self._prompts.get(event.sequence_id)
        if prompt is None:
            return
        prompt.admitted = time.monotonic()
        prompt.cached_tokens = event.cached_tokens
        prompt.span = self.telemetry.start_span(
            "prefill",
            parent=TraceContext.parse(prompt.spec.traceparent),
            attributes={
                "kvrelay.worker": self.host.config.name,
                "kvrelay.prompt_tokens": len(prompt.spec.tokens),
                "kvrelay.cached_tokens": event.cached_tokens,
            },
        )
        prompt.sender.admitted(event.blocks, event.cached_blocks, context_of(prompt.span))
        self.host.send(
            pb.WorkerMessage(
                sequence_started=pb.SequenceStarted(
                    sequence_id=wire_id(event.sequence_id),
                    cached_tokens=event.cached_tokens,
                    queue_seconds=prompt.admitted - prompt.submitted,
                ),
            ),
            session_of(event.sequence_id),
        )

    def _first_token(self, event: FirstToken) -> list[pb.TokenRun]:
        prompt = self._prompts.get(event.sequence_id)
        if prompt is None:
            return []
        prompt.prefill_s = time.monotonic() - prompt.admitted
        if prompt.span is not None:
            prompt.span.end()
            prompt.span = None
        if event.finish is None:
            prompt.sender.computed(FirstOutput(event.token, prompt.cached_tokens))
        else:
            self._release(prompt)  # the answer is one token: nobody needs the KV
        return [token_run(event.sequence_id, prompt.spec.output_offset, event.token, event.finish)]

    def _failed(self, event: SequenceFailed) -> None:
        prompt = self._prompts.get(event.sequence_id)
        if prompt is not None:
            prompt.ending = True
            prompt.sender.fail(event.error)

    def _sent(self, sequence_id: int, sent: Sent) -> None:
        prompt = self._prompts[sequence_id]
        self._bandwidth = sent.bytes / max(sent.seconds, 1e-9)
        self.host.send(
            pb.WorkerMessage(
                kv_sent=pb.KvSent(
                    sequence_id=wire_id(sequence_id),
                    bytes=sent.bytes,
                    messages=sent.messages,
                    seconds=sent.seconds,
                    prefill_seconds=prompt.prefill_s,
                    transport=sent.transport,
                ),
            ),
            session_of(sequence_id),
        )


def _end(span: Span, error: BaseException | None) -> None:
    if error is not None:
        span.set_attribute("error.type", getattr(error, "code", type(error).__name__))
        span.set_status(StatusCode.ERROR)
    span.end()
