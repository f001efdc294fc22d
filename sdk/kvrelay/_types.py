"""What callers hand in and get back, events and errors aside."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from kvrelay._events import Usage


class Message(TypedDict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: NotRequired[str]


class ChatOptions(TypedDict, total=False):
    """Keyword options of `stream()` and `chat()`, the same on both clients."""

    model: str | None
    """Which model answers; by default the first one that `/v1/models` lists."""
    max_tokens: int | None
    """Upper bound of the answer, in tokens."""
    temperature: float | None
    """0 is greedy; 0 to 2."""
    top_p: float | None
    """Keep the smallest set of most likely tokens whose probability reaches this."""
    top_k: int | None
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float | None
    """Drop tokens less likely than this share of the most likely one."""
    seed: int | None
    """Same seed, same prompt, same model: same answer."""
    stop: str | Sequence[str] | None
    """Strings at which the answer ends; they are not part of it."""
    extra: Mapping[str, Any] | None
    """Further fields of the request body; these win over the options above."""
    idempotency_key: str | None
    """Names this request across retries; a fresh one is drawn by default."""
    wait: float | None
    """Longest wait for a worker in seconds; 0 fails at once with `ServiceUnavailableError`, whose
    `retry_after` says when a worker may be up. By default the server's own limits hold."""
    timeout: "Timeout | None"
    """Replaces the client's limits for this request."""


def check_options(options: ChatOptions) -> None:
    """Raise the `TypeError` that an explicit signature would raise."""
    known = ChatOptions.__optional_keys__
    for name in options.keys() - known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "other body fields go into extra={...}"
        raise TypeError(f"unknown option {name!r}; {hint}")


def _positive(**limits: float | None) -> None:
    for name, value in limits.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be more than 0 seconds, or None for no limit: {value}")


@dataclass(frozen=True, slots=True)
class Timeout:
    """How long to wait, in seconds; `None` waits for ever."""

    connect: float | None = 5.0
    """For the TCP (and TLS) connection; tried again within the retries."""
    first_token: float | None = 120.0
    """From sending to the first piece of text, time in the queue included."""
    idle: float | None = 30.0
    """For the next byte once the answer has begun to arrive; a live server pings every 10 s."""
    total: float | None = 600.0
    """From sending to the end, retries included."""

    def __post_init__(self) -> None:
        _positive(
            connect=self.connect,
            first_token=self.first_token,
            idle=self.idle,
            total=self.total,
        )


@dataclass(frozen=True, slots=True)
class Retries:
    """How often to try again, and how long to pause; never once output was seen."""

    max: int = 4
    """Attempts after the first."""
    backoff_s: float = 0.5
    """The first pause; each further one is twice as long. Pauses are jittered."""
    backoff_max_s: float = 8.0
    """The longest pause of our own."""
    retry_after_max_s: float = 60.0
    """The longest pause a server can ask for."""

    def __post_init__(self) -> None:
        for name, value in (
            ("max", self.max),
            ("backoff_s", self.backoff_s),
            ("backoff_max_s", self.backoff_max_s),
            ("retry_after_max_s", self.retry_after_max_s),
        ):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"Retries.{name} must be 0 or more: {value}")


DEFAULT_TIMEOUT = Timeout()
DEFAULT_RETRIES = Retries()


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one request went; `None` where nobody measured.

    `client_*` and `retries` are measured here, everything else is reported by the server.
    """

    client_ttft_ms: float | None = None
    """From the moment the client sends to the first text; retries count."""
    client_itl_p50_ms: float | None = None
    """Median gap between two pieces of text."""
    client_itl_p95_ms: float | None = None
    queue_ms: float | None = None
    prefill_ms: float | None = None
    kv_transfer_ms: float | None = None
    kv_exposed_ms: float | None = None
    """The part of the transfer that prefill did not hide."""
    decode_ms: float | None = None
    tokens_per_s: float | None = None
    kv_bytes: int | None = None
    kv_transport: str | None = None
    """What carried the KV blocks, by UCX's name for it."""
    kv_gbps: float | None = None
    """10^9 bytes a second while blocks moved."""
    path: str | None = None
    """`disaggregated` or `local`."""
    reason: str | None = None
    """Why that path."""
    prefill_worker: str | None = None
    decode_worker: str | None = None
    cached_tokens: int | None = None
    """Prompt tokens whose KV was already there."""
    replays: int = 0
    """How often the server moved the request to another worker."""
    retries: int = 0
    """How often this client sent it again."""


@dataclass(frozen=True, slots=True)
class Final:
    """A complete answer."""

    text: str
    finish_reason: str
    usage: Usage | None
    timings: Timings
    trace_id: str | None
    request_id: str | None


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of `/v1/models`."""

    id: str
    max_model_len: int | None
    """The context window in tokens: prompt and answer together."""
    raw: Mapping[str, Any] = field(repr=False)
    """The entry as the server sent it."""


@dataclass(frozen=True, slots=True)
class Health:
    """Answer of `/health`; `ok` means that a token can be produced now."""

    ok: bool
    status_code: int
    raw: Mapping[str, Any]
    """The body, empty where it was no JSON object."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised text."""

    ids: tuple[int, ...]
    max_model_len: int | None

    def __len__(self) -> int:
        return len(self.ids)
