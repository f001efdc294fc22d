"""Every operation of a client, as a flow without I/O. Both clients run these and nothing else."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import random
from typing import Any, TypeVar
from uuid import uuid4

from kvrelay import _wire as wire
from kvrelay._config import Config
from kvrelay._errors import (
    APIConnectionError,
    InvalidResponseError,
    KvrelayClientError,
    NotFoundError,
    Phase,
)
from kvrelay._exchange import (
    Chunk,
    Emit,
    Eof,
    Failure,
    Flow,
    Head,
    Opened,
    Read,
    Request,
    Send,
    Sleep,
    read,
    send,
)
from kvrelay._retry import pause_before_retry
from kvrelay._sse import EventTooLargeError, SSEDecoder
from kvrelay._state import Limits, StreamState
from kvrelay._types import ChatOptions, Final, Health, Message, Model, Retries, Tokens

T = TypeVar("T")

_ONCE = Retries(max=0)
_DRAIN_S = 0.25  # how long the end of a body is worth waiting for, to keep its connection


class _Attempts:
    """Sends one request until it is answered. Owns the count of retries."""

    def __init__(
        self, flows: "Flows", request: Request, limits: Limits, within: Phase, policy: Retries
    ) -> None:
        self._flows = flows
        self._request = request
        self._limits = limits
        self._within: Phase = within
        self._policy = policy
        self.used = 0

    def answer(self, *, also: int | None = None) -> Flow[Head]:
        """The first success (or status `also`); the last failure is raised."""
        while True:
            deadline = self._limits.answer_by(self._within, self._flows.clock())
            outcome = yield from send(Send(self._request, self._limits.connect_s, deadline))
            if isinstance(outcome, Head) and (outcome.ok or outcome.status == also):
                return outcome
            if not (yield from self.pause(outcome)):
                raise self._error(outcome)

    def pause(self, outcome: Head | Failure) -> Flow[bool]:
        """Wait for the next attempt; False where there is none."""
        pause_s = pause_before_retry(
            outcome, used=self.used, policy=self._policy, dice=self._flows.dice()
        )
        if pause_s is None or self._flows.clock() + pause_s >= self._limits.total_at:
            return False
        self.used += 1
        yield Sleep(pause_s)
        return True

    def _error(self, outcome: Head | Failure) -> KvrelayClientError:
        if isinstance(outcome, Head):
            return wire.status_error(outcome)
        where = self._flows.config.base_url
        match outcome.kind:
            case "connect_timeout":
                error: APIConnectionError = self._limits.passed("connect", to=where)
            case "timeout":
                late = self._flows.clock() >= self._limits.total_at
                error = self._limits.passed("total" if late else self._within)
            case _:
                error = APIConnectionError(f"no answer from {where}: {outcome.detail}")
        error.__cause__ = outcome.cause
        return error


@dataclass(frozen=True, slots=True)
class StreamFlow:
    """A stream to be run, and what it has said so far."""

    state: StreamState
    flow: Flow[None]


class Flows:
    """A client's operations. Holds its settings and the model it asks by default."""

    def __init__(
        self,
        config: Config,
        *,
        clock: Callable[[], float] = time.monotonic,
        dice: Callable[[], float] = random,
    ) -> None:
        self.config = config
        self.clock = clock
        self.dice = dice
        self._default_model: str | None = None

    # --- documents ---

    def models(self) -> Flow[list[Model]]:
        """`GET /v1/models`."""
        return wire.parse_models((yield from self._document("/v1/models").answer()))

    def health(self) -> Flow[Health]:
        """`GET /health`, asked once: an unhealthy server is an answer, not an error."""
        attempts = self._document("/health", policy=_ONCE)
        return wire.parse_health((yield from attempts.answer(also=503)))

    def tokenize(self, text: str | Sequence[Message], model: str | None) -> Flow[Tokens]:
        """`POST /tokenize`: a text as it is, or messages through the chat template."""
        name = yield from self._model(model)
        what = {"prompt": text} if isinstance(text, str) else {"messages": [*text]}
        attempts = self._document("/tokenize", {"model": name, **what})
        return wire.parse_tokens((yield from attempts.answer()))

    def detokenize(self, tokens: Sequence[int], model: str | None) -> Flow[str]:
        """`POST /detokenize`."""
        name = yield from self._model(model)
        attempts = self._document("/detokenize", {"model": name, "tokens": [*tokens]})
        return wire.parse_text((yield from attempts.answer()))

    # --- chat ---

    def chat(self, messages: str | Sequence[Message], options: ChatOptions) -> Flow[Final]:
        """`POST /v1/chat/completions` without a stream."""
        model = yield from self._model(options.get("model"))
        state = StreamState(self._limits(options))
        attempts = self._chat(messages, model, options, state.limits, stream=False)
        head = yield from self._answer(attempts)
        found = wire.parse_completion(head)
        state.retries = attempts.used
        state.opened(head)
        state.take_timings(found.timings)
        return Final(
            text=found.text,
            finish_reason=found.finish_reason,
            usage=found.usage,
            timings=state.timings(),
            trace_id=state.trace_id,
            request_id=state.request_id,
        )

    def stream(self, messages: str | Sequence[Message], options: ChatOptions) -> StreamFlow:
        """`POST /v1/chat/completions` with a stream; nothing is sent before the flow runs."""
        state = StreamState(self._limits(options))
        return StreamFlow(state, self._stream(state, messages, options))

    def _stream(
        self, state: StreamState, messages: str | Sequence[Message], options: ChatOptions
    ) -> Flow[None]:
        try:
            model = yield from self._model(options.get("model"))
            state.limits = self._limits(options)  # looking the model up is not the server's time
            attempts = self._chat(messages, model, options, state.limits, stream=True)
            while (cut := (yield from self._attend(state, attempts))) is not None:
                # What the caller has seen can't be taken back, so it can't be asked for again.
                if state.emitted or not (yield from attempts.pause(cut)):
                    raise state.interrupted(f"the connection broke: {cut.detail}") from cut.cause
                if state.cancelled:
                    return
        except KvrelayClientError as error:
            state.error = error
            raise

    def _attend(self, state: StreamState, attempts: _Attempts) -> Flow[Failure | None]:
        """One attempt at the whole stream; returns the cut where the connection broke."""
        head = yield from self._answer(attempts)
        kind = head.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise InvalidResponseError(f"asked for an event stream, got {kind or 'no type'!r}")
        first = state.opened(head)
        state.retries = attempts.used
        if first:
            yield Opened()
        return (yield from self._events(state))

    def _events(self, state: StreamState) -> Flow[Failure | None]:
        decoder = SSEDecoder()
        while True:
            outcome = yield from read(Read(state.read_deadline(self.clock())))
            if state.cancelled:
                return None
            match outcome:
                case Chunk():
                    if (yield from self._parts(state, decoder, outcome)):
                        yield from self._drain()
                        return None
                case _ if state.finish_reason is not None:
                    return None  # the answer is complete, only its epilogue is lost
                case Eof():
                    raise state.interrupted("the connection ended before the answer did")
                case Failure(kind="timeout", cause=cause):
                    raise state.timed_out(self.clock()) from cause
                case Failure():
                    return outcome

    def _parts(self, state: StreamState, decoder: SSEDecoder, chunk: Chunk) -> Flow[bool]:
        """Emit what a chunk completes; True once the server is done."""
        try:
            frames = decoder.feed(chunk.data)
        except EventTooLargeError as error:
            raise state.interrupted(str(error)) from error
        for part in (part for frame in frames for part in wire.parse_frame(frame)):
            match part:
                case wire.Done() if state.finish_reason is None:
                    raise state.interrupted("the server ended the stream before the answer")
                case wire.Done():
                    return True
                case wire.ServerError():
                    raise state.interrupted(part.message, part)
                case wire.ServerTimings():
                    state.take_timings(part)
                case _:
                    yield Emit(state.take(part, chunk.at))
        # Pings keep a connection from being idle; they do not stop the clock.
        if state.overdue(chunk.at) is not None:
            raise state.timed_out(chunk.at)
        return False

    def _drain(self) -> Flow[None]:
        deadline = self.clock() + _DRAIN_S
        while isinstance((yield from read(Read(deadline))), Chunk):
            if self.clock() >= deadline:
                return

    # --- requests ---

    def _limits(self, options: ChatOptions | None = None) -> Limits:
        timeout = (options or {}).get("timeout") or self.config.timeout
        return Limits.since(self.clock(), timeout)

    def _document(
        self, path: str, body: Mapping[str, Any] | None = None, policy: Retries | None = None
    ) -> _Attempts:
        """A small document; a server that takes longer than `idle` over it is hung."""
        request = Request(
            "GET" if body is None else "POST",
            self.config.base_url + path,
            wire.headers(self.config.api_key),
            None if body is None else wire.encode(body),
        )
        return _Attempts(self, request, self._limits(), "idle", policy or self.config.retries)

    def _chat(
        self,
        messages: str | Sequence[Message],
        model: str,
        options: ChatOptions,
        limits: Limits,
        *,
        stream: bool,
    ) -> _Attempts:
        # All attempts carry one key, so that a server can tell a retry from a second request.
        key = options.get("idempotency_key") or f"idem_{uuid4().hex}"
        request = Request(
            "POST",
            f"{self.config.base_url}/v1/chat/completions",
            wire.headers(
                self.config.api_key,
                idempotency_key=key,
                wait_s=options.get("wait"),
                stream=stream,
            ),
            wire.chat_body(messages, model, options, stream=stream),
            stream=stream,
        )
        within: Phase = "first_token" if stream else "total"
        return _Attempts(self, request, limits, within, self.config.retries)

    # --- the default model ---

    def _model(self, given: str | None) -> Flow[str]:
        if given is not None:
            return given
        if self._default_model is None:
            models = yield from self.models()
            if not models:
                raise InvalidResponseError("the server lists no model; name one with model=...")
            self._default_model = models[0].id
        return self._default_model

    def _answer(self, attempts: _Attempts) -> Flow[Head]:
        try:
            return (yield from attempts.answer())
        except NotFoundError:
            self._default_model = None  # the server may have been restarted with another one
            raise
