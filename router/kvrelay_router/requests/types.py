"""What the HTTP edge gives to the request service, and the events it gets back."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from kvrelay_protocol.errors import KvrelayError
from kvrelay_protocol.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """A request the edge has authenticated, validated, rendered and tokenised. Nothing is optional."""

    request_id: str
    model: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int]
    """End-of-sequence tokens of the model (unless the client asked to ignore them) and the client's own."""
    deadline_s: float
    """Seconds from now until the request fails with `DeadlineExceeded`."""
    cache_salt: bytes = b""
    traceparent: str | None = None
    """W3C context of the caller, if any."""
    force_path: "PathKind | None" = None
    """For tests and measurements: place on this path or fail."""
    wait_s: float | None = None
    """Longest wait for a place, where the caller named one; 0 fails at once."""
    operation: str = "chat"
    """What the client asked for, in the words of OpenTelemetry's `gen_ai.operation.name`."""


class PathKind(StrEnum):
    """How the prompt's KV comes to the decode worker."""

    DISAGGREGATED = "disaggregated"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Path:
    """Where one attempt runs, and why."""

    kind: PathKind
    reason: str
    """Short machine-readable word, e.g. `least_loaded`, `no_prefill_worker`, `prefill_quiet`, `short_prompt`, `replay`."""
    prefill_worker: str | None
    decode_worker: str


class FinishReason(StrEnum):
    """Why the model stopped, in the API's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Queued:
    """No worker can take the request yet; `position` counts from 1."""

    position: int
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class ColdStart:
    """The request is parked, and a worker that may serve it comes up."""

    pool: str
    """`prefill` or `decode`."""
    phase: str
    """`wake` where one that sleeps wakes up; else `requested` until the worker's process speaks, then what it
    does: `import`, `check_device`, `load_weights`, `warm_up`, `start_transport`."""
    done: int
    """Bytes of the phase, where it counts them; else 0."""
    total: int
    eta_s: float | None
    """Seconds left, by the last start or wake; None before the first."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Workers are chosen. Comes once per attempt; `attempt` 0 is the first."""

    path: Path
    attempt: int


@dataclass(frozen=True, slots=True)
class Started:
    """A worker computes the prompt. Comes once, before the first `Tokens`."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """A replay delivered its first token: the stream goes on after a gap."""

    gap_s: float
    from_index: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Output token ids in order, each exactly once over all attempts."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Where the time and the bytes went; zeros where a stage did not happen. Times in seconds."""

    path: Path
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    kv_transfer_s: float = 0.0
    kv_exposed_s: float = 0.0
    decode_s: float = 0.0
    time_to_first_token_s: float = 0.0
    kv_bytes: int = 0
    kv_transport: str = ""
    replays: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """Terminal: the answer is complete."""

    reason: FinishReason
    stats: RequestStats


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: a typed error; tokens sent before stay valid."""

    error: KvrelayError


RequestEvent = Queued | ColdStart | Placed | Started | Resumed | Tokens | Finished | Failed


class RequestStream(Protocol):
    """One request in flight, seen from the edge. Ends in exactly one `Finished` or `Failed`.

    The per-stream buffer is bounded by `max_tokens`; the service never waits for a slow reader.
    """

    trace_id: str
    """32 hexadecimal digits of the request's trace."""
    traceparent: str
    """W3C context of the request's root span: the parent of further answers to the same client."""

    def __aiter__(self) -> AsyncIterator[RequestEvent]: ...

    def divert(self, take: Callable[[tuple[int, ...]], None]) -> None:
        """Allow tokens to go to `take` at once, from within the service, instead of coming as `Tokens`.

        They do so only while no event before them waits for the reader. `take` must not raise.
        """

    def stop_early(self) -> None:
        """A stop string was found: cancel in both pools; the stream then ends in `Finished(STOP)`."""

    def cancel(self, reason: str) -> None:
        """The client is gone: cancel in both pools at once. Idempotent; ends in `Failed(ClientGone)`."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One joined worker, as `/health?verbose` shows it."""

    name: str
    role: str
    device: str
    running: int
    waiting: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    draining: bool
    asleep: bool = False
    """Or on its way there or back: it is given no work now. One that finishes what it has is `draining`."""


@dataclass(frozen=True, slots=True)
class Health:
    """Ready only when a token can be produced: at least one decode worker has joined."""

    ready: bool
    phase: str
    workers: tuple[WorkerView, ...] = field(default=())
    starting: tuple[str, ...] = ()
    """Names of workers that are on their way."""
    max_model_len: int | None = None
    """Tokens of prompt plus answer that every decode worker holds; None while none has joined."""


class RequestService(Protocol):
    """What the HTTP edge needs from the rest of the router."""

    def submit(self, request: ValidRequest) -> RequestStream:
        """Admit a request.

        Raises:
            QueueFull: the admission queue is at its limit.
            Draining: the router shuts down.
        """

    def health(self) -> Health: ...

    def context_limit(self) -> int | None:
        """`Health.max_model_len`, without the rest: every request asks for it."""
