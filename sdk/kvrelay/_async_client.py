"""The asyncio client: how the actions of a flow are carried out on an event loop."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

from kvrelay._config import Config, resolve, tls
from kvrelay._events import Event, TextDelta
from kvrelay._exchange import (
    Chunk,
    Emit,
    Eof,
    Failure,
    Flow,
    Head,
    Opened,
    Outcome,
    Read,
    Returned,
    Send,
    Sleep,
    Step,
    failure_or_raise,
    head_of,
)
from kvrelay._flows import Flows, StreamFlow
from kvrelay._state import StreamView
from kvrelay._types import (
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT,
    ChatOptions,
    Final,
    Health,
    Message,
    Model,
    Retries,
    Timeout,
    Tokens,
    check_options,
)

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")


class AsyncClient:
    """Talks to a kvrelay server from asyncio. The same names as `Client`.

    `base_url` is the argument, else `KVRELAY_BASE_URL`, else http://127.0.0.1:8000; `api_key` the
    argument, else `KVRELAY_API_KEY`, else none. An injected `http_client` stays yours to close.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        http_client: "httpx.AsyncClient | None" = None,
        timeout: Timeout = DEFAULT_TIMEOUT,
        retries: Retries = DEFAULT_RETRIES,
    ) -> None:
        config = resolve(base_url=base_url, api_key=api_key, timeout=timeout, retries=retries)
        self._flows = Flows(config)
        self._owned = http_client is None
        self._http = http_client or _http_client(config)

    def stream(
        self, messages: str | Sequence[Message], **options: Unpack[ChatOptions]
    ) -> "AsyncStreamManager":
        """Ask, and read the answer as it comes.

        Nothing is sent before the `async with` statement; leaving it cancels what still runs.
        """
        check_options(options)
        return AsyncStreamManager(self._http, self._flows, messages, options)

    async def chat(
        self, messages: str | Sequence[Message], **options: Unpack[ChatOptions]
    ) -> Final:
        """Ask, and wait for the whole answer."""
        check_options(options)
        return await self._call(self._flows.chat(messages, options))

    async def models(self) -> list[Model]:
        """The models this server answers for."""
        return await self._call(self._flows.models())

    async def health(self) -> Health:
        """Whether the server can produce a token now; does not raise where it says no."""
        return await self._call(self._flows.health())

    async def tokenize(self, text: str | Sequence[Message], *, model: str | None = None) -> Tokens:
        """Token ids of a text as it is, or of messages through the chat template."""
        return await self._call(self._flows.tokenize(text, model))

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids."""
        return await self._call(self._flows.detokenize(tokens, model))

    async def close(self) -> None:
        """Close idle connections; the client can't be used afterwards."""
        if self._owned:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _call(self, flow: Flow[T]) -> T:
        async with aclosing(_Transport(self._http)) as transport:
            step = await _step(transport, flow)
        if isinstance(step, Returned):
            return step.value
        raise TypeError(f"a call has no use for {step!r}")


class AsyncStreamManager:
    """`async with client.stream(...) as stream:`; sends on the way in, cancels on the way out."""

    def __init__(
        self,
        http: "httpx.AsyncClient",
        flows: Flows,
        messages: str | Sequence[Message],
        options: ChatOptions,
    ) -> None:
        self._http = http
        self._flows = flows
        self._messages = messages
        self._options = options
        self._stream: AsyncStream | None = None

    async def __aenter__(self) -> "AsyncStream":
        if self._stream is not None:
            raise RuntimeError("a stream can be entered once; call client.stream() again")
        self._stream = AsyncStream(
            _Transport(self._http), self._flows.stream(self._messages, self._options)
        )
        return await self._stream._open()  # noqa: SLF001 - the manager is the stream's other half

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            await self._stream.cancel()


class AsyncStream(StreamView):
    """An answer on its way. Iterate it for events, or `text_stream` for text alone."""

    def __init__(self, transport: "_Transport", run: StreamFlow) -> None:
        super().__init__(run.state)
        self._transport = transport  # closed when the stream ends, fails or is cancelled
        self._flow = run.flow

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        step = await self._advance()
        if isinstance(step, Emit):
            return step.event
        raise StopAsyncIteration

    @property
    def events(self) -> AsyncIterator[Event]:
        """The events not yet read."""
        return self

    @property
    def text_stream(self) -> AsyncIterator[str]:
        """The text not yet read, piece by piece."""
        return (event.text async for event in self if isinstance(event, TextDelta))

    async def final(self) -> Final:
        """Read what is left; the complete answer, or the error that says why there is none."""
        async for _ in self:
            pass
        return self._state.final()

    async def final_text(self) -> str:
        """Read what is left; the complete text."""
        return (await self.final()).text

    async def cancel(self) -> None:
        """Stop generating, from any task. What has arrived stays readable."""
        self._state.cancelled = True
        await self._transport.interrupt()

    async def _open(self) -> Self:
        await self._advance()
        return self

    async def _advance(self) -> Step[None]:
        if self._state.cancelled:
            return Returned(None)
        try:
            step = await _step(self._transport, self._flow)
        except BaseException:
            await self._transport.aclose()
            raise
        if isinstance(step, Returned):
            await self._transport.aclose()
        return step


async def _step(transport: "_Transport", flow: Flow[T]) -> Step[T]:
    """Run a flow until there is something for the caller."""
    outcome: Outcome = None
    while True:
        try:
            action = flow.send(outcome)
        except StopIteration as stop:
            return Returned(stop.value)
        match action:
            case Send():
                outcome = await transport.send(action)
            case Read():
                outcome = await transport.read(action)
            case Sleep():
                await transport.sleep(action)
                outcome = None
            case Opened() | Emit():
                return action


class _Transport:
    """Carries out one flow's actions. Owns the response that is open, if any."""

    def __init__(self, http: "httpx.AsyncClient") -> None:
        self._http = http
        self._response: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None
        self._interrupted = asyncio.Event()

    async def send(self, action: Send) -> Head | Failure:
        await self.aclose()
        request = action.request
        try:
            async with asyncio.timeout(_left(action.deadline)):
                self._response = response = await self._http.send(
                    self._http.build_request(
                        request.method,
                        request.url,
                        headers=dict(request.headers),
                        content=request.body,
                        # Every other limit is a deadline, which asyncio keeps better.
                        timeout=(action.connect_s, None, None, None),
                    ),
                    stream=True,
                )
                if request.stream and response.is_success:
                    return head_of(response.status_code, response.headers.items())
                body = await response.aread()
        except Exception as error:
            await self.aclose()
            return failure_or_raise(error)
        await self.aclose()
        return head_of(response.status_code, response.headers.items(), body)

    async def read(self, action: Read) -> Chunk | Eof | Failure:
        if self._response is None:
            return Failure("cut", "the response is closed")
        if self._chunks is None:
            self._chunks = self._response.aiter_bytes()
        try:
            async with asyncio.timeout(_left(action.deadline)):
                data = await anext(self._chunks, None)
        except Exception as error:
            return failure_or_raise(error)
        return Eof() if data is None else Chunk(data, time.monotonic())

    async def sleep(self, action: Sleep) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(action.seconds):
                await self._interrupted.wait()

    async def interrupt(self) -> None:
        """Give up, from any task, also while another one waits in `read`."""
        self._interrupted.set()
        await self.aclose()

    async def aclose(self) -> None:
        """Give up the open response; unless it was read to its end, the server sees us leave."""
        response, self._response, self._chunks = self._response, None, None
        if response is not None:
            with suppress(Exception):  # a connection that broke can't be closed more than it is
                await response.aclose()


def _left(deadline: float) -> float | None:
    return None if math.isinf(deadline) else deadline - time.monotonic()


def _http_client(config: Config) -> "httpx.AsyncClient":
    import httpx

    # A stream holds its connection for minutes: the server queues, the client must not.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(verify=tls(config), limits=limits)
