"""A client for streamed completions that costs little: it shares the machine with what it measures.

asyncio protocols, an HTTP parser in C (httptools, which uvicorn uses) and the SDK's SSE decoder. By
`thread_time` over 4 streams of 2,000 chunks on uvloop: about 50 us a chunk, httpx about 165 us (one chunk
a read, on busy cores). Every run reports what it took.
"""

import asyncio
import contextlib
import json
import ssl
import time
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from kvrelay._sse import EventTooLargeError, ServerSentEvent, SSEDecoder

_OK = 200
_REJECTED = frozenset({429, 503})
_MESSAGE_CHARACTERS = 200


class Outcome(StrEnum):
    """What became of a request. Everything but `OK` and `STOPPED` is a failure."""

    OK = "ok"
    REJECTED = "rejected"
    """Refused before anything was computed: 429 or 503."""
    ABORTED = "aborted"
    """Begun and not finished: an error in the stream, a cut connection, or the time limit."""
    FAILED = "failed"
    """No connection, or another status."""
    STOPPED = "stopped"
    """Given up by the benchmark itself."""


@dataclass(slots=True)
class Answer:
    """One request as its client saw it. Times are those of `time.perf_counter`."""

    sent: float = 0.0
    """Before the connection is taken or made."""
    chunks: list[float] = field(default_factory=list)
    """When every piece of text was read."""
    counts: list[int] = field(default_factory=list)
    """Tokens so far at each of `chunks`; empty where the server does not say."""
    ended: float = 0.0
    outcome: Outcome = Outcome.STOPPED
    problem: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    path: str = ""
    """Which workers computed it, where the server is kvrelay."""

    @property
    def tokens(self) -> int:
        """Tokens of the answer: as the server counted them, else a token a piece of text."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return self.counts[-1] if self.counts else len(self.chunks)

    def end(self, outcome: Outcome, problem: str = "") -> None:
        self.outcome, self.problem = outcome, problem[:_MESSAGE_CHARACTERS]
        self.ended = time.perf_counter()


class _ConnectionLostError(Exception):
    """The connection ended before the response began."""


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, used by one request after the other."""

    def __init__(self) -> None:
        self.reusable = False
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer = Answer()
        self._done: asyncio.Future[None] | None = None
        self._decoder = SSEDecoder()
        self._status = 0
        self._streams = False
        self._body = bytearray()
        self._error: Any = None
        self._finished = False
        self._over = False
        self._now = 0.0

    async def exchange(self, request: bytes, answer: Answer) -> None:
        """Send and read until the response has ended; its outcome is in `answer`.

        Raises:
            _ConnectionLostError: it ended before anything was answered.
        """
        if self._transport is None or self._transport.is_closing():
            raise _ConnectionLostError
        self.reusable = False
        self._answer, self._done = answer, asyncio.get_running_loop().create_future()
        self._decoder, self._body = SSEDecoder(), bytearray()
        self._status, self._error, self._finished, self._over = 0, None, False, False
        self._streams = False
        self._transport.write(request)
        await self._done

    def abort(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, EventTooLargeError, ValueError) as error:
            self._settle(Outcome.ABORTED, f"no HTTP response that can be read: {error}")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._done is None or self._done.done():
            return
        if not self._status:
            self._done.set_exception(_ConnectionLostError())
        elif self._over:
            self._conclude()  # a body that ends with the connection
        else:
            self._settle(
                Outcome.ABORTED, f"the connection was cut: {exc or 'closed by the server'}"
            )

    # -- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        match name.lower():
            case b"content-type":
                self._streams = value.startswith(b"text/event-stream")
            case b"x-kvrelay-path":
                self._answer.path = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._status != _OK or not self._streams:
            self._body += body
            return
        for event in self._decoder.feed(body):
            self._on_event(event)

    def on_message_complete(self) -> None:
        if self._status >= _OK:  # not one of the 1xx that come before
            self.reusable = self._parser.should_keep_alive()
            self._conclude()

    # -- what the server said

    def _on_event(self, event: ServerSentEvent) -> None:
        if event.name:
            return
        if event.data == "[DONE]":
            self._over = True
            return
        document = json.loads(event.data)
        self._error = document.get("error") or self._error
        usage = document.get("usage")
        if usage:
            self._on_usage(usage)
        for choice in document.get("choices", ()):
            if choice.get("text"):
                self._answer.chunks.append(self._now)
                if usage:
                    self._answer.counts.append(usage["completion_tokens"])
            self._finished = self._finished or choice.get("finish_reason") is not None

    def _on_usage(self, usage: dict[str, Any]) -> None:
        answer = self._answer
        answer.completion_tokens = usage.get("completion_tokens")
        answer.prompt_tokens = usage.get("prompt_tokens")
        details = usage.get("prompt_tokens_details") or {}
        answer.cached_tokens = details.get("cached_tokens")

    def _conclude(self) -> None:
        if self._status in _REJECTED:
            self._settle(Outcome.REJECTED, f"{self._status} {_error_text(bytes(self._body))}")
        elif self._status != _OK or not self._streams:
            self._settle(Outcome.FAILED, f"{self._status} {_error_text(bytes(self._body))}")
        elif self._error is not None:
            self._settle(Outcome.ABORTED, _message(self._error))
        elif not self._finished:
            self._settle(Outcome.ABORTED, "the stream ended without a finish_reason")
        else:
            self._settle(Outcome.OK)

    def _settle(self, outcome: Outcome, problem: str = "") -> None:
        if self._done is not None and not self._done.done():
            self._answer.end(outcome, problem)
            self._done.set_result(None)


def _error_text(body: bytes) -> str:
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return _message(json.loads(text)["error"])
    return text.strip() or "without a reason"


def _message(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


class CompletionClient:
    """Posts to `{base_url}/v1/completions` over as many connections as there are open requests."""

    def __init__(self, base_url: str, *, api_key: str = "", timeout_s: float = 600.0) -> None:
        """Args: `timeout_s` is the longest a request may take; later it counts as aborted."""
        parts = urlsplit(base_url)
        tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if tls else 80)
        self._tls = ssl.create_default_context() if tls else None
        path = parts.path.rstrip("/").removesuffix("/v1")
        headers = [
            f"POST {path}/v1/completions HTTP/1.1",
            f"Host: {parts.netloc.rpartition('@')[2]}",
            "Accept: text/event-stream",
            "Accept-Encoding: identity",
            "Content-Type: application/json",
        ]
        if api_key:
            headers.append(f"Authorization: Bearer {api_key}")
        self._head = "\r\n".join(headers).encode("latin-1")
        self._timeout_s = timeout_s
        # The one used last first: a server closes those that were idle for long.
        self._idle: deque[_Connection] = deque()

    async def complete(self, body: bytes, answer: Answer | None = None) -> Answer:
        """Send one request and read its stream; whatever happens is in the answer.

        Cancelling closes the connection, which cancels the request on the server; an `answer` that was
        passed in holds what had come until then.
        """
        answer = answer or Answer()
        answer.sent = time.perf_counter()
        request = self._head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(request, answer)
        except TimeoutError:
            answer.end(Outcome.ABORTED, f"no end within {self._timeout_s:g} s")
        except OSError as error:
            answer.end(Outcome.FAILED, f"no connection: {error.strerror or error}")
        except asyncio.CancelledError:
            answer.end(Outcome.STOPPED)
            raise
        return answer

    async def _exchange(self, request: bytes, answer: Answer) -> None:
        while self._idle:
            try:
                return await self._use(self._idle.pop(), request, answer)
            except _ConnectionLostError:
                continue  # it was idle for too long; nothing of the request was answered
        try:
            await self._use(await self._connect(), request, answer)
        except _ConnectionLostError:
            answer.end(Outcome.FAILED, "the server closed the connection without an answer")

    async def _use(self, connection: _Connection, request: bytes, answer: Answer) -> None:
        try:
            await connection.exchange(request, answer)
        finally:
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.abort()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self._host, self._port, ssl=self._tls
        )
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
