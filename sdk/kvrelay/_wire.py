"""The wire: bodies and headers out, frames and documents in. `docs/streaming.md` is the text."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kvrelay._errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    ContextOverflowError,
    InternalServerError,
    InvalidResponseError,
    NotFoundError,
    PermissionDeniedError,
    QueueFull,
    RateLimitError,
    RequestTimeoutError,
    RequestTooLargeError,
    ServiceUnavailableError,
)
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
from kvrelay._exchange import Head
from kvrelay._retry import retry_after_s
from kvrelay._sse import ServerSentEvent
from kvrelay._types import ChatOptions, Health, Message, Model, Tokens

Json: TypeAlias = Mapping[str, Any]

_LOCAL_OPTIONS = frozenset({"extra", "idempotency_key", "timeout", "model", "wait"})


# --- out -------------------------------------------------------------------------------------


def as_messages(messages: str | Sequence[Message]) -> list[Message]:
    """A string is one turn of the user."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]


def chat_body(
    messages: str | Sequence[Message], model: str, options: ChatOptions, *, stream: bool
) -> bytes:
    """The body of `/v1/chat/completions`; options left out or None are the server's to choose."""
    body: dict[str, Any] = {"model": model, "messages": as_messages(messages), "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    body |= {
        name: value
        for name, value in options.items()
        if name not in _LOCAL_OPTIONS and value is not None
    }
    body |= options.get("extra") or {}
    return encode(body)


def encode(body: Json) -> bytes:
    """A JSON body, in ASCII: a lone surrogate in the prompt is the server's to judge."""
    return json.dumps(body, separators=(",", ":"), default=list).encode()


def headers(
    api_key: str | None,
    *,
    idempotency_key: str | None = None,
    wait_s: float | None = None,
    stream: bool = False,
) -> dict[str, str]:
    """Headers of one request."""
    found = {
        "accept": "text/event-stream" if stream else "application/json",
        "content-type": "application/json",
        "user-agent": "kvrelay-python",
    }
    if stream:
        found["x-stream-protocol"] = "1"
        found["accept-encoding"] = "identity"  # a compressor in between would hold text back
    if api_key is not None:
        found["authorization"] = f"Bearer {api_key}"
    if idempotency_key is not None:
        found["idempotency-key"] = idempotency_key
    if wait_s is not None:
        found["x-kvrelay-wait"] = f"{wait_s:g}"
    parent = traceparent()
    if parent is not None:
        found["traceparent"] = parent
    return found


def traceparent() -> str | None:
    """The active OpenTelemetry span in W3C form, if the program has loaded OpenTelemetry at all."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return None
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{int(span.trace_flags):02x}"


# --- in: frames ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerTimings:
    """The `timings` frame, or the `kvrelay` key of a document."""

    fields: Json


@dataclass(frozen=True, slots=True)
class ServerError:
    """An error frame after the 200."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """`data: [DONE]`."""


Part: TypeAlias = Event | ServerTimings | ServerError | Done


def parse_frame(frame: ServerSentEvent) -> list[Part]:
    """What one frame says. Named frames never fail: what can't be read is kept as it came.

    An unnamed frame may be text, so one that can't be read is an error, or text would be missing.
    """
    named = frame.name not in {"", "message"}  # "message" is what SSE calls an unnamed one
    if not named and frame.data.strip() == "[DONE]":
        return [Done()]
    data = _object_or_none(frame.data)
    if named:
        return _named(frame, data)
    if data is None:
        return [ServerError("the server sent a frame that is not a JSON object")]
    if data.get("error") is not None or data.get("object") == "error":
        return [_error(data)]
    return _chunk(frame, data)


def _named(frame: ServerSentEvent, data: Json | None) -> list[Part]:
    if data is None:
        return [UnknownEvent(frame.name, frame.data)]
    try:
        match frame.name:
            case "ping":
                return []
            case "queued":
                return [Queued(_int(data, "position"), _float_or_none(data, "eta_s"))]
            case "cold_start":
                return [
                    ColdStart(
                        pool=_str(data, "pool"),
                        phase=_str(data, "phase"),
                        done=_int(data, "done", 0),
                        total=_int(data, "total", 0),
                        eta_s=_float_or_none(data, "eta_s"),
                    )
                ]
            case "started":
                return [
                    Started(
                        path=_str(data, "path"),
                        reason=_str_or_none(data, "reason") or "",
                        prefill_worker=_str_or_none(data, "prefill_worker"),
                        decode_worker=_str_or_none(data, "decode_worker") or "",
                        cached_tokens=_int(data, "cached_tokens", 0),
                        prompt_tokens=_int(data, "prompt_tokens", 0),
                    )
                ]
            case "resumed":
                return [Resumed(_float_or_none(data, "gap_s") or 0.0, _int(data, "from_index"))]
            case "timings":
                return [ServerTimings(data)]
            case "error":
                return [_error(data)]
    except (TypeError, ValueError):
        pass
    return [UnknownEvent(frame.name, frame.data)]


def _chunk(frame: ServerSentEvent, data: Json) -> list[Part]:
    choices = data.get("choices")
    if not isinstance(choices, list):
        return [UnknownEvent("", frame.data)]
    parts: list[Part] = []
    for choice in choices:
        parts += _choice(frame, choice)
    usage = parse_usage(data.get("usage"))
    return [*parts, usage] if usage is not None else parts


def _choice(frame: ServerSentEvent, choice: object) -> list[Part]:
    unknown = UnknownEvent("", frame.data)
    # A second answer (n > 1, asked for through `extra`) must not be mixed into the first.
    if not isinstance(choice, dict) or choice.get("index", 0) != 0:
        return [unknown]
    parts: list[Part] = []
    delta = choice.get("delta")
    fields: dict[str, Any] = delta if isinstance(delta, dict) else {}
    text = fields.get("content")
    if isinstance(text, str) and text:
        parts.append(TextDelta(text))
    if any(value for key, value in fields.items() if key not in {"content", "role"}):
        parts.append(unknown)  # reasoning, tool calls: kept until they have events of their own
    reason = choice.get("finish_reason")
    if reason is not None:
        parts.append(Finished(str(reason)))
    return parts


def _error(data: Json) -> ServerError:
    error = data.get("error")
    if isinstance(error, str):
        return ServerError(error)
    # Some servers send the fields flat, `{"object": "error", "message": ...}`.
    fields = error if isinstance(error, dict) else data
    return ServerError(
        message=str(fields.get("message") or "the server reported an error without a message"),
        type=_text(fields.get("type")),
        param=_text(fields.get("param")),
        code=_text(fields.get("code")),
    )


# --- in: documents ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Completion:
    """A non-stream answer."""

    text: str
    finish_reason: str
    usage: Usage | None
    timings: ServerTimings


def parse_completion(head: Head) -> Completion:
    """The document of `/v1/chat/completions`."""
    data = document(head)
    try:
        choice = data["choices"][0]
        text = choice["message"].get("content") or ""
        reason = str(choice["finish_reason"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InvalidResponseError("the server's answer is no chat completion") from error
    timings = data.get("kvrelay")
    return Completion(
        text,
        reason,
        parse_usage(data.get("usage")),
        ServerTimings(timings if isinstance(timings, dict) else {}),
    )


def parse_usage(usage: object) -> Usage | None:
    """OpenAI's usage object, or None where there is none."""
    if not isinstance(usage, dict):
        return None
    try:
        prompt = _int(usage, "prompt_tokens", 0)
        completion = _int(usage, "completion_tokens", 0)
        details = usage.get("prompt_tokens_details")
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=_int(usage, "total_tokens", prompt + completion),
            cached_tokens=_int(details, "cached_tokens", 0) if isinstance(details, dict) else 0,
        )
    except (TypeError, ValueError):
        return None


def parse_models(head: Head) -> list[Model]:
    """The document of `/v1/models`."""
    entries = document(head).get("data")
    if not isinstance(entries, list):
        raise InvalidResponseError("the server's answer is no list of models")
    return [
        Model(entry["id"], _int_or_none(entry, "max_model_len"), entry)
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    ]


def parse_health(head: Head) -> Health:
    """The document of `/health`, which may be empty."""
    return Health(head.ok, head.status, _object_or_none(head.body) or {})


def parse_tokens(head: Head) -> Tokens:
    """The document of `/tokenize`."""
    data = document(head)
    ids = data.get("tokens")
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise InvalidResponseError("the server's answer has no list of token ids")
    return Tokens(tuple(ids), _int_or_none(data, "max_model_len"))


def parse_text(head: Head) -> str:
    """The document of `/detokenize`."""
    text = document(head).get("prompt")
    if not isinstance(text, str):
        raise InvalidResponseError("the server's answer has no text")
    return text


def document(head: Head) -> Json:
    """A body that must be a JSON object."""
    data = _object_or_none(head.body)
    if data is None:
        raise InvalidResponseError(f"the server's {head.status} is not a JSON object")
    return data


# --- in: errors ------------------------------------------------------------------------------

_BY_STATUS: Mapping[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: RequestTimeoutError,
    409: ConflictError,
    413: RequestTooLargeError,
    429: RateLimitError,
    503: ServiceUnavailableError,
}
_BY_CODE: Mapping[tuple[int, str | None], type[APIStatusError]] = {
    (400, "context_length_exceeded"): ContextOverflowError,
    (429, "queue_full"): QueueFull,
}


def status_error(head: Head) -> APIStatusError:
    """The exception for an answer that is no success."""
    data = _object_or_none(head.body)
    error = _error(data) if data else ServerError(_plain(head))
    request_id = head.headers.get("x-request-id")
    general = InternalServerError if head.status >= 500 else APIStatusError
    cls = _BY_CODE.get((head.status, error.code)) or _BY_STATUS.get(head.status, general)
    status = f"{head.status} {error.code}" if error.code else f"{head.status}"
    found = cls(
        with_request_id(f"{error.message} [{status}]", request_id),
        status_code=head.status,
        code=error.code,
        type=error.type,
        param=error.param,
        request_id=request_id,
        retry_after=retry_after_s(head.headers),
    )
    if isinstance(found, ContextOverflowError):
        found.limit, found.requested = _overflow(data or {}, error.message)
    return found


def with_request_id(message: str, request_id: str | None) -> str:
    """The message, naming the request unless the server already did."""
    named = request_id is None or request_id in message
    return message if named else f"{message} (request {request_id})"


def _plain(head: Head) -> str:
    """The first line of a body that is not ours, a proxy's page for instance."""
    lines = head.body[:400].decode("utf-8", "replace").strip().splitlines()
    return lines[0][:200] if lines else "the server gave no reason"


_LIMIT = re.compile(r"(?:context (?:length|window|size)?|limit)\D{0,40}?(\d+)", re.IGNORECASE)
# In this order: "the request has 500 prompt tokens ..., which needs at least 600" means 600.
_REQUESTED = tuple(
    re.compile(rf"\b(?:{verb})\D{{0,40}}?(\d+)", re.IGNORECASE)
    for verb in ("needs?", "requested|asks? for", "resulted in|has|have")
)


def _overflow(data: Json, message: str) -> tuple[int | None, int | None]:
    """Limit and request: from fields beside `message` where present, else from its text."""
    fields = data.get("error")
    if isinstance(fields, dict) and {"limit", "requested"} <= fields.keys():
        return _int_or_none(fields, "limit"), _int_or_none(fields, "requested")
    limit = _LIMIT.search(message)
    requested = next((hit for verb in _REQUESTED if (hit := verb.search(message))), None)
    return int(limit[1]) if limit else None, int(requested[1]) if requested else None


# --- JSON fields -----------------------------------------------------------------------------


def _object_or_none(text: str | bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _int(data: Json, key: str, default: int | None = None) -> int:
    value = data.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} is no integer")
    return value


def _int_or_none(data: Json, key: str) -> int | None:
    value = data.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _float_or_none(data: Json, key: str) -> float | None:
    value = data.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{key} is no number")
    return float(value)


def _str(data: Json, key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise TypeError(f"{key} is no string")
    return value


def _str_or_none(data: Json, key: str) -> str | None:
    return None if data.get(key) is None else _str(data, key)


def _text(value: object) -> str | None:
    return None if value is None else str(value)
