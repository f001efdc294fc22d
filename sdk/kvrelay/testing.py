"""A kvrelay server for tests: real sockets, scripted answers, no model.

    from kvrelay import Client, Finished, Queued, TextDelta
    from kvrelay.testing import FakeServer, delay

    with FakeServer(script=[Queued(3), delay(0.1), TextDelta("hi"), Finished("stop")]) as server:
        with Client(server.base_url) as client:
            assert client.chat("hello", model="fake").text == "hi"
    assert server.requests[-1].json["messages"][0]["content"] == "hello"

It runs on a thread of its own, on a free port, and records what it was asked.
"""

import asyncio
import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self, TypeAlias

from kvrelay._events import (
    ColdStart,
    Event,
    Finished,
    Queued,
    Resumed,
    Started,
    TextDelta,
    UnknownEvent,
    Usage,
)

__all__ = [
    "CHAT",
    "FakeServer",
    "RecordedRequest",
    "Reply",
    "Status",
    "Step",
    "delay",
    "drop",
    "end",
    "error",
    "frame",
    "ping",
    "raw",
    "status",
    "timings",
]

CHAT = "/v1/chat/completions"


# --- what a script is made of ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Delay:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Drop:
    """Cut the connection; what follows answers the next request."""


@dataclass(frozen=True, slots=True)
class End:
    """End the response as HTTP wants it, without `[DONE]`."""


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes as they are."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Status:
    """A whole response instead of a stream."""

    status: int
    body: bytes
    headers: Mapping[str, str]


Step: TypeAlias = Event | Delay | Drop | End | Raw
Reply: TypeAlias = Sequence[Step] | Status


def delay(seconds: float) -> Delay:
    """Wait before the next step."""
    return Delay(seconds)


def drop() -> Drop:
    """Cut the connection here. The rest of the script answers the next chat request."""
    return Drop()


def end() -> End:
    """End the response cleanly here, without `[DONE]`."""
    return End()


def raw(data: bytes) -> Raw:
    """Send bytes as they are, in one chunk."""
    return Raw(data)


def frame(data: object, name: str = "") -> Raw:
    """Send one SSE frame, named or not."""
    return Raw(_frame(name, data if isinstance(data, str) else _json(data)))


def ping() -> Raw:
    """Send the frame that says "still here"."""
    return frame({}, "ping")


def timings(**fields: float | str | None) -> Raw:
    """Send the `timings` frame."""
    return frame(fields, "timings")


def error(
    message: str,
    *,
    code: str | None = None,
    type: str = "server_error",  # noqa: A002 - the wire's name
    param: str | None = None,
) -> Raw:
    """Send an error frame, as a server does that fails after the 200."""
    return frame({"error": {"message": message, "type": type, "param": param, "code": code}})


def status(
    status_code: int,
    message: str = "scripted",
    *,
    code: str | None = None,
    type: str = "server_error",  # noqa: A002 - the wire's name
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    body: object = None,
) -> Status:
    """Answer with a status and an error object, or with `body`."""
    fields = {"message": message, "type": type, "param": param, "code": code}
    content = {"error": fields} if body is None else body
    data = content if isinstance(content, bytes) else _json(content).encode()
    return Status(status_code, data, headers or {})


# --- what was asked --------------------------------------------------------------------------


@dataclass(slots=True)
class RecordedRequest:
    """One request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes = field(repr=False)
    at: float
    """When it was complete, on the monotonic clock."""
    _gone: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    def client_left(self, timeout: float = 30.0) -> bool:
        """Wait until the client closed the connection before the answer was complete."""
        return self._gone.wait(timeout)


# --- the server ------------------------------------------------------------------------------

_HELLO: tuple[Step, ...] = (
    Started("local", "fake", decode_worker="decode-0", prompt_tokens=3),
    TextDelta("Hello"),
    TextDelta(" world"),
    Finished("stop"),
    Usage(3, 2, 5),
)


class FakeServer:
    """Serves scripts to chat requests, until it is closed.

    `script` answers every chat request for which nothing was queued. `queue()` adds replies for
    the requests to come, in order. A script ends in `[DONE]` unless `drop()` or `end()` ended it.
    """

    def __init__(
        self,
        script: Sequence[Step] = _HELLO,
        *,
        models: Sequence[str] = ("fake",),
        api_key: str | None = None,
    ) -> None:
        self.requests: list[RecordedRequest] = []
        self._script = script
        self._models = models
        self._api_key = api_key
        self._queued: defaultdict[str, deque[Reply]] = defaultdict(deque)
        self._port = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvrelay-fake-server", daemon=True)

    @property
    def base_url(self) -> str:
        """Where it listens; hand it to a client."""
        return f"http://127.0.0.1:{self._port}"

    def queue(self, *replies: Reply, path: str = CHAT) -> None:
        """Add replies, one per request to `path`, before the default applies again."""
        self._queued[path].extend(replies)

    def chats(self) -> list[RecordedRequest]:
        """The chat requests so far."""
        return [request for request in self.requests if request.path == CHAT]

    def start(self) -> Self:
        """Listen; returns once requests are served."""
        self._thread.start()
        self._ready.wait()
        return self

    def close(self) -> None:
        """Cut every connection and stop."""
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- on the server's thread ---

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        def accept() -> asyncio.StreamReaderProtocol:
            reader = _Reader()

            def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = asyncio.create_task(self._connection(reader, writer))
                connections.add(task)
                task.add_done_callback(connections.discard)

            return asyncio.StreamReaderProtocol(reader, connected)

        server = await self._loop.create_server(accept, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: "_Reader", writer: asyncio.StreamWriter) -> None:
        gone = asyncio.create_task(reader.gone.wait())
        try:
            while (request := await _read_request(reader)) is not None:
                self.requests.append(request)
                answer = asyncio.create_task(self._answer(request, writer))
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                # A client that leaves shows as an end of its input or as a failing write.
                if answer.cancel() or isinstance(answer.exception(), ConnectionError):
                    request._gone.set()  # noqa: SLF001 - written here, read by the test
                    return
                if not answer.result():
                    return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or the server is being closed
        finally:
            gone.cancel()
            writer.transport.abort()

    async def _answer(self, request: RecordedRequest, writer: asyncio.StreamWriter) -> bool:
        """Send one response; False where the connection is not to be used again."""
        reply = self._reply(request)
        if isinstance(reply, Status):
            await _send_status(writer, reply, self._headers())
            return True
        steps = deque(reply)
        if not request.json.get("stream"):
            return await self._answer_whole(writer, steps)
        head = {
            **self._headers(),
            "content-type": "text/event-stream",
            "cache-control": "no-cache",
            "transfer-encoding": "chunked",
        }
        writer.write(_head(200, head))
        await writer.drain()
        while steps:
            match steps.popleft():
                case Delay(seconds=seconds):
                    await asyncio.sleep(seconds)
                case Drop():
                    if steps:
                        self._queued[CHAT].appendleft([*steps])
                    return False
                case End():
                    steps.clear()
                    writer.write(b"0\r\n\r\n")
                    await writer.drain()
                    return True
                case Raw(data=data):
                    await _send_chunk(writer, data)
                case event:
                    await _send_chunk(writer, _encode(event))
        await _send_chunk(writer, _frame("", "[DONE]"))
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _answer_whole(self, writer: asyncio.StreamWriter, steps: deque[Step]) -> bool:
        document: dict[str, Any] = {"object": "chat.completion", "kvrelay": {}}
        text = ""
        reason: str | None = None
        while steps:
            match steps.popleft():
                case Delay(seconds=seconds):
                    await asyncio.sleep(seconds)
                case Drop():
                    if steps:
                        self._queued[CHAT].appendleft([*steps])
                    return False
                case TextDelta(text=more):
                    text += more
                case Finished() as finished:
                    reason = finished.reason
                case Usage() as usage:
                    document["usage"] = _usage(usage)
                case Raw(data=data) if data.startswith(b"event: timings\n"):
                    document["kvrelay"] = json.loads(data.partition(b"data: ")[2])
                case _:
                    pass
        message = {"role": "assistant", "content": text}
        document["choices"] = [{"index": 0, "message": message, "finish_reason": reason}]
        await _send_status(writer, status(200, body=document), self._headers())
        return True

    def _reply(self, request: RecordedRequest) -> Reply:
        key = request.headers.get("authorization")
        if self._api_key is not None and key != f"Bearer {self._api_key}":
            return status(401, "no such key", code="invalid_api_key", type="authentication_error")
        queued = self._queued[request.path]
        if queued:
            return queued.popleft()
        match request.path:
            case "/v1/chat/completions":
                return self._script
            case "/v1/models":
                entries = [{"id": name, "object": "model"} for name in self._models]
                return status(200, body={"object": "list", "data": entries})
            case "/health":
                return status(200, body={"status": "ok"})
            case "/tokenize":  # one token per byte
                prompt = request.json.get("prompt") or _json(request.json.get("messages"))
                ids = [*prompt.encode()]
                return status(200, body={"tokens": ids, "count": len(ids), "max_model_len": 4096})
            case "/detokenize":
                text = bytes(request.json["tokens"]).decode("utf-8", "replace")
                return status(200, body={"prompt": text})
            case _:
                return status(404, "no such route", code="not_found")

    def _headers(self) -> dict[str, str]:
        number = len(self.requests)
        return {"x-request-id": f"req_{number}", "x-trace-id": f"{number:032x}"}


class _Reader(asyncio.StreamReader):
    """Tells when the client goes away, without reading into its next request."""

    def __init__(self) -> None:
        super().__init__()
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: BaseException) -> None:
        super().set_exception(exc)  # type: ignore[arg-type]
        self.gone.set()


async def _read_request(reader: asyncio.StreamReader) -> RecordedRequest | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").rstrip().split("\r\n")
    method, path, _ = first.split(" ", 2)
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return RecordedRequest(method, path, headers, body, time.monotonic())


async def _send_status(writer: asyncio.StreamWriter, reply: Status, more: dict[str, str]) -> None:
    headers = {
        **more,
        "content-type": "application/json",
        "content-length": str(len(reply.body)),
        **{name.lower(): value for name, value in reply.headers.items()},
    }
    writer.write(_head(reply.status, headers) + reply.body)
    await writer.drain()


async def _send_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
    await writer.drain()


def _head(status_code: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status_code} .", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _encode(event: Event) -> bytes:
    match event:
        case ColdStart():
            return _frame("cold_start", _json(asdict(event)))
        case Queued() | Started() | Resumed():
            return _frame(type(event).__name__.lower(), _json(asdict(event)))
        case TextDelta(text=text):
            return _frame("", _chunk({"content": text}, None))
        case Finished(reason=reason):
            return _frame("", _chunk({}, reason))
        case Usage():
            return _frame("", _json({**_CHUNK, "choices": [], "usage": _usage(event)}))
        case UnknownEvent(name=name, raw=data):
            return _frame(name, data)


_CHUNK = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 0, "model": "fake"}


def _chunk(delta: Mapping[str, str], reason: str | None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return _json({**_CHUNK, "choices": [choice], "usage": None})


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _frame(name: str, data: str) -> bytes:
    lines = [f"event: {name}"] if name else []
    lines += [f"data: {line}" for line in data.split("\n")]
    return "\n".join([*lines, "", ""]).encode()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
