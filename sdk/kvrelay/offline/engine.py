"""Requests through the decode worker's scheduler and the model, in the thread that asks."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvrelay.offline.answer import AnswerText
from kvrelay.offline.interrupt import DeferredInterrupt
from kvrelay.offline.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from kvrelay.offline.prompts import TokenisedPrompt
from kvrelay.offline.sampling_params import SamplingParams
from kvrelay.offline.tokenizer import LLMTokenizer
from kvrelay_decode.scheduler import DecodeScheduler, LocalPrefillStarted, TokenSampled
from kvrelay_engine.batch import TokenLogprobs
from kvrelay_engine.cache.allocator import BlockAllocator
from kvrelay_engine.runner import ModelRunner
from kvrelay_engine.sequence import FinishReason, SequenceFailed, SequenceSpec
from kvrelay_protocol.errors import InternalError, KvrelayError

log = logging.getLogger(__name__)

_NO_DEADLINE = float("inf")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with everything that was asked of it, checked."""

    request_id: str
    prompt: TokenisedPrompt
    params: SamplingParams
    seed: int
    """Of the first answer; the next ones count up, as over HTTP."""
    max_tokens: int
    eos_token_ids: frozenset[int]
    stop_token_ids: frozenset[int]
    """All that end an answer, the model's own included unless they are ignored."""


@dataclass(slots=True)
class _Answer:
    """One sequence, from submit until its output is complete."""

    request: "_Running"
    index: int
    text: AnswerText | None
    """Only where stop strings are looked for as tokens come."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class _Running:
    """One request and its answers so far."""

    request: Request
    arrival: float
    scheduled: float = 0.0
    first_token: float = 0.0
    cached_tokens: int = 0
    outputs: dict[int, CompletionOutput] = field(default_factory=dict)
    held: list[_Answer] = field(default_factory=list)
    """Answers that wait for the first one to have computed their common prompt."""
    error: KvrelayError | None = None


class OfflineEngine:
    """One model and one pool, in one thread at a time.

    Prompts are handed to the scheduler as its backlog of prompt tokens runs down, not all at once:
    a later one then finds in the prefix cache what an earlier one has computed.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        tokenizer: LLMTokenizer | None,
        fingerprint: str,
        max_batch_tokens: int,
        max_sequences: int,
        share_prefixes: bool,
    ) -> None:
        self.runner = runner
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._share_prefixes = share_prefixes
        self._next_id = 0
        self._queue: deque[_Answer] = deque()
        self._open: dict[int, _Answer] = {}
        self._dirty = False
        """A call has begun and not ended: not even its end, which may be interrupted too."""
        self.reset()

    def reset(self) -> None:
        """Forget every sequence and every cached block."""
        self._queue.clear()
        self._open.clear()
        self._dirty = False
        pool = self.runner.pool
        self.scheduler = DecodeScheduler(
            BlockAllocator(pool.num_blocks, pool.block_size),
            fingerprint=self._fingerprint,
            max_batch_tokens=self._max_batch_tokens,
            max_sequences=self._max_sequences,
        )

    def run(
        self, requests: Sequence[Request], finished: Callable[[RequestOutput], None]
    ) -> list[RequestOutput]:
        """Answer all requests; the result is in their order.

        Args:
            requests: at least none.
            finished: told about each as it is complete, in the order of completion.

        Raises:
            KeyboardInterrupt: between two steps; like after any other exception, nothing of this
                call is left in the engine.
        """
        if self._dirty:
            self.reset()
        self._dirty = True
        arrival = time.monotonic()
        outputs: dict[str, RequestOutput] = {}

        def complete(running: _Running) -> None:
            output = _request_output(running)
            outputs[output.request_id] = output
            finished(output)

        try:
            with DeferredInterrupt() as interrupt:
                for request in requests:
                    self._enqueue(_Running(request, arrival))
                while self._queue or self._open:
                    self._step(complete)
                    interrupt.check()
        except BaseException:
            self._let_go()
            raise
        self._dirty = False
        return [outputs[request.request_id] for request in requests]

    def check_integrity(self) -> None:
        """Raises AssertionError where a block is lost or owned twice."""
        self.scheduler.check_integrity()

    def _let_go(self) -> None:
        """End what runs. A scheduler that broke off half-way through a change is replaced."""
        try:
            for sequence_id in self._open:
                self.scheduler.abort(sequence_id)
            self.scheduler.take_events()
            self.scheduler.check_integrity()
        except Exception:
            log.debug("the scheduler is replaced", exc_info=True)
            self.reset()
        self._queue.clear()
        self._open.clear()
        self._dirty = False

    def _enqueue(self, running: _Running) -> None:
        request = running.request
        answers = [_Answer(running, index, None) for index in range(request.params.n)]
        shared = len(request.prompt.ids) > self.runner.pool.block_size
        if self._share_prefixes and shared:
            running.held = answers[1:]
            answers = answers[:1]
        self._queue.extend(answers)

    def _step(self, complete: Callable[[_Running], None]) -> None:
        self._feed()
        batch = self.scheduler.schedule()
        if batch is None:
            raise InternalError("sequences are open, but none of them can be scheduled")
        begun = time.monotonic()
        self.scheduler.commit(batch, self.runner.step(batch))
        now = time.monotonic()
        for event in self.scheduler.take_events():
            if isinstance(event, TokenSampled):
                self._token(event, now, complete)
            elif isinstance(event, LocalPrefillStarted):
                self._started(event, begun)
            elif isinstance(event, SequenceFailed):
                self._failed(event, complete)

    def _feed(self) -> None:
        if not self._queue:
            return
        backlog = self.scheduler.backlog_tokens
        while self._queue and backlog < self._max_batch_tokens:
            answer = self._queue.popleft()
            backlog += len(answer.request.request.prompt.ids)
            self._submit(answer)

    def _submit(self, answer: _Answer) -> None:
        request, sequence_id = answer.request.request, self._next_id
        self._next_id += 1
        if request.params.stop_strings:
            answer.text = self._answer_text(request)
        self._open[sequence_id] = answer
        self.scheduler.submit(
            SequenceSpec(
                sequence_id=sequence_id,
                request_id=request.request_id,
                tokens=request.prompt.ids,
                output_offset=0,
                max_tokens=request.max_tokens,
                stop_token_ids=request.stop_token_ids,
                sampling=request.params.for_engine(
                    request.seed + answer.index, self.runner.config.vocab_size
                ),
                deadline_s=_NO_DEADLINE,
                cache_salt=self._salt(answer),
            )
        )

    def _salt(self, answer: _Answer) -> bytes:
        request = answer.request.request
        if self._share_prefixes:
            return request.prompt.salt
        # A salt of its own keeps an answer's blocks from all others, and for its own preemption.
        return f"{request.request_id}/{answer.index}".encode()

    def _started(self, event: LocalPrefillStarted, now: float) -> None:
        answer = self._open[event.sequence_id]
        if answer.index == 0:
            answer.request.scheduled = now
            answer.request.cached_tokens = event.cached_tokens

    def _token(self, event: TokenSampled, now: float, complete: Callable[[_Running], None]) -> None:
        answer = self._open[event.sequence_id]
        answer.tokens.append(event.token)
        if event.logprobs is not None:
            answer.logprobs.append(event.logprobs)
        if event.index == 0 and answer.index == 0:
            answer.request.first_token = now
            self._release_held(answer.request)
        finish = event.finish
        # The text of a token that ends an answer is not searched.
        searched = None if finish is FinishReason.STOP else answer.text
        if searched is not None and searched.push(event.token):
            finish = FinishReason.STOP
            self.scheduler.abort(event.sequence_id)
        if finish is not None:
            del self._open[event.sequence_id]
            self._finish(answer, finish.value, complete)

    def _failed(self, event: SequenceFailed, complete: Callable[[_Running], None]) -> None:
        answer = self._open.pop(event.sequence_id)
        answer.request.error = event.error
        self._release_held(answer.request)
        self._finish(answer, "error", complete)

    def _release_held(self, running: _Running) -> None:
        self._queue.extendleft(reversed(running.held))
        running.held = []

    def _finish(self, answer: _Answer, reason: str, complete: Callable[[_Running], None]) -> None:
        running = answer.request
        running.outputs[answer.index] = self._completion(answer, reason)
        if len(running.outputs) == running.request.params.n:
            complete(running)

    def _answer_text(self, request: Request) -> AnswerText | None:
        params = request.params
        if self._tokenizer is None or not params.detokenize:
            return None
        return AnswerText(
            self._tokenizer.detokenizer(
                request.prompt.context, skip_special_tokens=params.skip_special_tokens
            ),
            stops=params.stop_strings,
            keep_stop=params.include_stop_str_in_output,
            unsearched=params.min_tokens,
        )

    def _completion(self, answer: _Answer, reason: str) -> CompletionOutput:
        request, tokens = answer.request.request, answer.tokens
        stop_string = answer.text.stop_string if answer.text is not None else None
        ended_by_token = reason == FinishReason.STOP.value and stop_string is None
        stop_reason: int | str | None = stop_string
        if ended_by_token and tokens[-1] not in request.eos_token_ids:
            stop_reason = tokens[-1]
        logprobs = self._logprobs(answer)
        return CompletionOutput(
            index=answer.index,
            text=self._text(answer, hide_last=ended_by_token),
            token_ids=tokens,
            cumulative_logprob=None
            if logprobs is None
            else sum(p.logprob for p in answer.logprobs),
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
        )

    def _text(self, answer: _Answer, *, hide_last: bool) -> str:
        request = answer.request.request
        text = answer.text or self._answer_text(request)
        if text is None:
            return ""
        hide_last = hide_last and not request.params.include_stop_str_in_output
        return text.finish(answer.tokens[:-1] if hide_last else answer.tokens)

    def _logprobs(self, answer: _Answer) -> list[dict[int, Logprob]] | None:
        params = answer.request.request.params
        if params.logprobs is None:
            return None
        decoded = self._tokenizer is not None and params.detokenize
        return [
            self._logprob_entry(token, found, decoded=decoded)
            for token, found in zip(answer.tokens, answer.logprobs, strict=True)
        ]

    def _logprob_entry(
        self, token: int, found: TokenLogprobs, *, decoded: bool
    ) -> dict[int, Logprob]:
        def text(token_id: int) -> str | None:
            return self._tokenizer.token_text(token_id) if self._tokenizer and decoded else None

        entry = {token: Logprob(found.logprob, found.rank, text(token))}
        for rank, (token_id, logprob) in enumerate(found.top, 1):
            entry.setdefault(token_id, Logprob(logprob, rank, text(token_id)))
        return entry


def _request_output(running: _Running) -> RequestOutput:
    request = running.request
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt.text,
        prompt_token_ids=list(request.prompt.ids),
        outputs=[running.outputs[index] for index in range(request.params.n)],
        metrics=RequestMetrics(
            arrival_time=running.arrival,
            first_scheduled_time=running.scheduled,
            first_token_time=running.first_token,
            finished_time=time.monotonic(),
        ),
        num_cached_tokens=running.cached_tokens,
        error=running.error,
    )
