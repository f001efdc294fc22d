"""The blocking client: how the actions of a flow are carried out with sockets and threads."""

import math
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

from kvrelay._config import Config, resolve, tls
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

from kvrelay._events import Event, TextDelta

T = TypeVar("T")


class Client:
    """Talks to a kvrelay server; blocks. Safe to share between threads.

    `base_url` is the argument, else `KVRELAY_BASE_URL`, else http://127.0.0.1:8000; `api_key` the
    argument, else `KVRELAY_API_KEY`, else none. An injected `http_client` stays yours to close.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        http_client: "httpx.Client | None" = None,
        timeout: Timeout = DEFAULT_TIMEOUT,
        retries: Retries = DEFAULT_RETRIES,
    ) -> None:
        config = resolve(base_url=base_url, api_key=api_key, timeout=timeout, retries=retries)
        self._flows = Flows(config)
        self._owned = http_client is None
        self._http = http_client or _http_client(config)

    def stream(
        self, messages: str | Sequence[Message], **options: Unpack[ChatOptions]
    ) -> "StreamManager":
        """Ask, and read the answer as it comes.

        Nothing is sent before the `with` statement; leaving it cancels what still runs.
        """
        check_options(options)
        return StreamManager(self._http, self._flows, messages, options)

    def chat(self, messages: str | Sequence[Message], **options: Unpack[ChatOptions]) -> Final:
        """Ask, and wait for the whole answer."""
        check_options(options)
        return self._call(self._flows.chat(messages, options))

    def models(self) -> list[Model]:
        """The models this server answers for."""
        return self._call(self._flows.models())

    def health(self) -> Health:
        """Whether the server can produce a token now; does not raise where it says no."""
        return self._call(self._flows.health())

    def tokenize(self, text: str | Sequence[Message], *, model: str | None = None) -> Tokens:
        """Token ids of a text as it is, or of messages through the chat template."""
        return self._call(self._flows.tokenize(text, model))

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids."""
        return self._call(self._flows.detokenize(tokens, model))

    def close(self) -> None:
        """Close idle connections; the client can't be used afterwards."""
        if self._owned:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, flow: Flow[T]) -> T:
        with closing(_Transport(self._http)) as transport:
            step = _step(transport, flow)
        if isinstance(step, Returned):
            return step.value
        raise TypeError(f"a call has no use for {step!r}")


class StreamManager:
    """`with client.stream(...) as stream:`; sends on the way in, cancels on the way out."""

    def __init__(
        self,
        http: "httpx.Client",
        flows: Flows,
        messages: str | Sequence[Message],
        options: ChatOptions,
    ) -> None:
        self._http = http
        self._flows = flows
        self._messages = messages
        self._options = options
        self._stream: Stream | None = None

    def __enter__(self) -> "Stream":
        if self._stream is not None:
            raise RuntimeError("a stream can be entered once; call client.stream() again")
        self._stream = Stream(
            _Transport(self._http), self._flows.stream(self._messages, self._options)
        )
        return self._stream._open()  # noqa: SLF001 - the manager is the stream's other half

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.cancel()


class Stream(StreamView):
    """An answer on its way. Iterate it for events, or `text_stream` for text alone."""

    def __init__(self, transport: "_Transport", run: StreamFlow) -> None:
        super().__init__(run.state)
        self._transport = transport  # closed when the stream ends, fails or is cancelled
        self._flow = run.flow

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        step = self._advance()
        if isinstance(step, Emit):
            return step.event
        raise StopIteration

    @property
    def events(self) -> Iterator[Event]:
        """The events not yet read."""
        return self

    @property
    def text_stream(self) -> Iterator[str]:
        """The text not yet read, piece by piece."""
        return (event.text for event in self if isinstance(event, TextDelta))

    def final(self) -> Final:
        """Read what is left; the complete answer, or the error that says why there is none."""
        for _ in self:
            pass
        return self._state.final()

    def final_text(self) -> str:
        """Read what is left; the complete text."""
        return self.final().text

    def cancel(self) -> None:
        """Stop generating, from any thread. What has arrived stays readable."""
        self._state.cancelled = True
        self._transport.interrupt()

    def _open(self) -> Self:
        self._advance()
        return self

    def _advance(self) -> Step[None]:
        if self._state.cancelled:
            self._transport.close()
            return Returned(None)
        try:
            step = _step(self._transport, self._flow)
        except BaseException:
            self._transport.close()
            raise
        if isinstance(step, Returned):
            self._transport.close()
        return step


def _step(transport: "_Transport", flow: Flow[T]) -> Step[T]:
    """Run a flow until there is something for the caller."""
    outcome: Outcome = None
    while True:
        try:
            action = flow.send(outcome)
        except StopIteration as stop:
            return Returned(stop.value)
        match action:
            case Send():
                outcome = transport.send(action)
            case Read():
                outcome = transport.read(action)
            case Sleep():
                transport.sleep(action)
                outcome = None
            case Opened() | Emit():
                return action


class _Transport:
    """Carries out one flow's actions. Owns the response that is open, if any."""

    def __init__(self, http: "httpx.Client") -> None:
        self._http = http
        self._response: httpx.Response | None = None
        self._chunks: Iterator[bytes] | None = None
        self._watchdog: _Watchdog | None = None
        self._reading = False
        self._interrupted = threading.Event()

    def send(self, action: Send) -> Head | Failure:
        self.close()
        left = action.deadline - time.monotonic()
        if left <= 0:
            return Failure("timeout", "no time left to send")
        request = action.request
        try:
            self._response = response = self._http.send(
                self._http.build_request(
                    request.method,
                    request.url,
                    headers=dict(request.headers),
                    content=request.body,
                    timeout=_timeouts(action.connect_s, left),
                ),
                stream=True,
            )
            if request.stream and response.is_success:
                return head_of(response.status_code, response.headers.items())
            body = response.read()
        except Exception as error:
            self.close()
            return failure_or_raise(error)
        self.close()
        return head_of(response.status_code, response.headers.items(), body)

    def read(self, action: Read) -> Chunk | Eof | Failure:
        if self._response is None:
            return Failure("cut", "the response is closed")
        chunks = self._chunks or self._begin(self._response, action.deadline)
        watchdog = self._watchdog
        if watchdog is not None:
            watchdog.arm(action.deadline)
        self._reading = True
        failure = None
        data = None
        try:
            data = next(chunks, None)
        except Exception as error:
            failure = failure_or_raise(error)
        finally:
            self._reading = False
            if watchdog is not None:
                watchdog.disarm()
        # The watchdog cuts the socket, which looks like a lost connection, or like an end.
        if watchdog is not None and watchdog.fired:
            return Failure("timeout", "the deadline passed", failure.cause if failure else None)
        return failure or (Eof() if data is None else Chunk(data, time.monotonic()))

    def sleep(self, action: Sleep) -> None:
        self._interrupted.wait(action.seconds)

    def interrupt(self) -> None:
        """Give up, from any thread, also while another one blocks in `read`."""
        self._interrupted.set()
        if self._reading and self._watchdog is not None:
            self._watchdog.bite()  # the reader wakes, and closes
        else:
            self.close()

    def close(self) -> None:
        """Give up the open response; unless it was read to its end, the server sees us leave."""
        response, self._response, self._chunks = self._response, None, None
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            watchdog.close()
        if response is not None:
            with suppress(Exception):  # a connection that broke can't be closed more than it is
                response.close()

    def _begin(self, response: "httpx.Response", deadline: float) -> Iterator[bytes]:
        """Start on a body: from here on deadlines move, which httpx can't express."""
        sock = _socket(response)
        if sock is not None:
            self._watchdog = _Watchdog(sock)
        # The transport reads this documented extension when the body is first asked for. Where no
        # socket can be had the first limit stands for all of them.
        limit = None if sock is not None else _finite(deadline - time.monotonic())
        response.request.extensions.get("timeout", {})["read"] = limit
        self._chunks = response.iter_bytes()
        return self._chunks


class _Watchdog:
    """Cuts a socket when its deadline passes: a blocking read has no other way to move one.

    One thread per open stream; `arm` and `disarm` bracket each read and cost no wake-up, because
    the thread sleeps towards the earliest deadline it has seen and looks again when it gets there.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._changed = threading.Condition()
        self._deadline = math.inf  # of the read in progress
        self._waking_at = math.inf
        self._closed = False
        self.fired = False
        threading.Thread(target=self._watch, name="kvrelay-deadline", daemon=True).start()

    def arm(self, deadline: float) -> None:
        with self._changed:
            self._deadline = deadline
            if deadline < self._waking_at:
                self._changed.notify()

    def disarm(self) -> None:
        with self._changed:
            self._deadline = math.inf

    def bite(self) -> None:
        """Cut the socket: the reader gets an error or an end."""
        with suppress(OSError):  # already gone
            # Not SSLSocket's: that one takes the TLS layer away from under the reader.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    self.fired = True
                    self.bite()
                    return
                self._waking_at = self._deadline
                self._changed.wait(_finite(left))


def _socket(response: "httpx.Response") -> socket.socket | None:
    """The socket under a response, where it is not shared with other requests."""
    stream = response.extensions.get("network_stream")
    if stream is None or not response.http_version.startswith("HTTP/1"):
        return None
    found = stream.get_extra_info("socket")
    return found if isinstance(found, socket.socket) else None


def _timeouts(
    connect_s: float | None, left: float
) -> tuple[float | None, float | None, float | None, float | None]:
    """Connect, read, write, pool, as httpx and its fork both take them."""
    return _finite(min(left, connect_s or math.inf)), _finite(left), _finite(left), _finite(left)


def _finite(seconds: float) -> float | None:
    return None if math.isinf(seconds) else max(0.0, seconds)


def _http_client(config: Config) -> "httpx.Client":
    import httpx

    # A stream holds its connection for minutes: the server queues, the client must not.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.Client(verify=tls(config), limits=limits)
