"""Every failure that crosses a process border, and what it is called on each wire.

```
KvrelayError
├── RequestError                    the client can mend it
│   ├── InvalidRequest              400 invalid_request_error
│   │   └── ContextOverflow         400 context_length_exceeded
│   ├── Unauthorized                401 invalid_api_key
│   ├── ModelNotFound               404 model_not_found
│   ├── NotFound                    404 not_found
│   ├── MethodNotAllowed            405 method_not_allowed
│   ├── BodyTooLarge                413 request_too_large
│   ├── UnsupportedMediaType        415 unsupported_media_type
│   ├── QueueFull                   429 queue_full
│   └── ClientGone                  499 client_disconnected (logged only)
├── ServiceError                    a retry elsewhere or later may work
│   ├── NoCapacity                  503 no_capacity
│   │   └── WaitOver                503 wait_over (no retry: the caller named the wait)
│   ├── Draining                    503 server_draining
│   ├── WorkerLost                  503 worker_lost
│   ├── DeadlineExceeded            504 deadline_exceeded
│   ├── LeaseLost                   503 lease_lost
│   ├── EngineFailed                500 engine_failed (ends the worker process, exit code 11)
│   └── InternalError               500 internal_error
├── TransferError                   KV did not arrive; the request is replayed or recomputed
│   ├── PeerLost, TransferCancelled, CorruptFrame, StaleFrame
│   ├── LayoutMismatch              two workers that can't exchange blocks
│   ├── WeightsRefused              a worker does not give another one its weights
│   └── TransportMisconfigured      the environment forbids every usable transport
├── ProviderError                   the platform that runs workers; exit codes below
│   ├── ProviderUnreachable         12
│   ├── ProviderDenied              13
│   ├── ProviderQuota               14
│   ├── ProviderMissing             15
│   └── SecondWriter                16
└── StartupError                    a process can't start; exit codes below
    ├── UsageError                  2
    ├── InvalidModel, UnsupportedModel   3, 4
    ├── PortInUse                   5
    ├── NotEnoughMemory             6
    ├── DeviceUnavailable           7
    └── WorkerStartFailed           8
```

A worker that the router refuses (join token, layout) exits with 10, without a usable transport with 9.

Each class carries its code, HTTP status and, for start-up, its exit code; `error_to_wire` and
`error_from_wire` are the only conversions.
"""

from dataclasses import dataclass
from typing import ClassVar


class KvrelayError(Exception):
    """Root of the tree. `str(error)` is one clear line: the value, the limit, the fix."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    wire_type: ClassVar[str] = "server_error"
    exit_code: ClassVar[int] = 1
    should_retry: ClassVar[bool | None] = None
    """Says it against what clients conclude from the status."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class RequestError(KvrelayError):
    """The client sent something that can't be served as it stands."""

    code = "invalid_request_error"
    http_status = 400
    wire_type = "invalid_request_error"


class InvalidRequest(RequestError):
    """A field is missing, of the wrong type or out of range."""

    code = "invalid_value"


class ContextOverflow(InvalidRequest):
    """Prompt plus `max_tokens` exceeds the model's context."""

    code = "context_length_exceeded"


class Unauthorized(RequestError):
    """No API key, or one this server does not know."""

    code = "invalid_api_key"
    http_status = 401
    wire_type = "authentication_error"
    exit_code = 10  # of a worker whose join token the router refuses


class ModelNotFound(RequestError):
    """The model is not served here."""

    code = "model_not_found"
    http_status = 404


class NotFound(RequestError):
    """No such route."""

    code = "not_found"
    http_status = 404


class MethodNotAllowed(RequestError):
    """The route exists, the method does not."""

    code = "method_not_allowed"
    http_status = 405


class BodyTooLarge(RequestError):
    """The body exceeds the server's limit in bytes."""

    code = "request_too_large"
    http_status = 413


class UnsupportedMediaType(RequestError):
    """The body is not `application/json`."""

    code = "unsupported_media_type"
    http_status = 415


class QueueFull(RequestError):
    """The bounded admission queue is full; `retry_after_s` says when to come back."""

    code = "queue_full"
    http_status = 429
    wire_type = "rate_limit_error"


class ClientGone(RequestError):
    """The client closed its connection; nobody is left to answer."""

    code = "client_disconnected"
    http_status = 499


class ServiceError(KvrelayError):
    """The request was fine, the service was not."""

    http_status = 503


class NoCapacity(ServiceError):
    """No worker that could run the request is connected."""

    code = "no_capacity"


class WaitOver(NoCapacity):
    """The caller named how long to wait for a worker, and that is over: asking again is up to them."""

    code = "wait_over"
    should_retry = False


class Draining(ServiceError):
    """The server is shutting down and takes no new work."""

    code = "server_draining"


class WorkerLost(ServiceError):
    """The worker died and the request could not be replayed in time."""

    code = "worker_lost"


class LeaseLost(ServiceError):
    """A KV lease expired or was refused."""

    code = "lease_lost"


class DeadlineExceeded(ServiceError):
    """The request's deadline passed."""

    code = "deadline_exceeded"
    http_status = 504


class EngineFailed(ServiceError):
    """A worker's engine loop ended by a defect; the process ends with it and is started again."""

    code = "engine_failed"
    http_status = 500
    exit_code = 11


class InternalError(ServiceError):
    """A defect of ours; the details are in the server's log under the request id."""

    code = "internal_error"
    http_status = 500


class TransferError(KvrelayError):
    """KV blocks did not arrive whole."""

    code = "transfer_failed"
    http_status = 503


class PeerLost(TransferError):
    """The other process is gone or unreachable."""

    code = "peer_lost"


class TransferCancelled(TransferError):
    """Cancelled by us, and confirmed: the buffer is free."""

    code = "transfer_cancelled"


class CorruptFrame(TransferError):
    """Digest, magic or length do not hold."""

    code = "corrupt_frame"


class StaleFrame(TransferError):
    """The frame belongs to another lease, incarnation or allocation."""

    code = "stale_frame"


class LayoutMismatch(TransferError):
    """Two workers describe their KV blocks differently."""

    code = "layout_mismatch"
    exit_code = 10


class WeightsRefused(TransferError):
    """A worker does not give its weights: no valid ticket, other weights, or not these bytes."""

    code = "weights_refused"


class TransportMisconfigured(TransferError):
    """The environment forbids every transport that could be used."""

    code = "transport_misconfigured"
    exit_code = 9


class ProviderError(KvrelayError):
    """The platform that runs workers did not do what was asked."""

    code = "provider_error"
    http_status = 503


class ProviderUnreachable(ProviderError):
    """It did not answer; what was asked may or may not be noted."""

    code = "provider_unreachable"
    exit_code = 12


class ProviderDenied(ProviderError):
    """The credentials are missing, expired or not allowed to do this."""

    code = "provider_denied"
    exit_code = 13


class ProviderQuota(ProviderError):
    """The account or the cluster is not allowed that many."""

    code = "provider_quota"
    exit_code = 14


class ProviderMissing(ProviderError):
    """What should be scaled or read does not exist there."""

    code = "provider_missing"
    exit_code = 15


class SecondWriter(ProviderError):
    """Something else sets the number of this pool's workers."""

    code = "second_writer"
    exit_code = 16


class StartupError(KvrelayError):
    """A process can't start; printed as one line, with a distinct exit code."""

    code = "startup_failed"


class UsageError(StartupError):
    """A flag's value is out of range."""

    code = "usage_error"
    exit_code = 2


class InvalidModel(StartupError):
    """The path is no model folder, or its files do not fit together."""

    code = "invalid_model"
    exit_code = 3


class UnsupportedModel(StartupError):
    """A model folder of an architecture this engine does not run."""

    code = "unsupported_model"
    exit_code = 4


class PortInUse(StartupError):
    """Another process listens there."""

    code = "port_in_use"
    exit_code = 5


class NotEnoughMemory(StartupError):
    """Weights plus KV pool do not fit."""

    code = "not_enough_memory"
    exit_code = 6


class DeviceUnavailable(StartupError):
    """The requested device does not exist here."""

    code = "device_unavailable"
    exit_code = 7


class WorkerStartFailed(StartupError):
    """A worker process ended before it was ready."""

    code = "worker_start_failed"
    exit_code = 8


@dataclass(frozen=True, slots=True)
class WireError:
    """An error as it travels: a code of this module and a message."""

    code: str
    message: str


def _leaves(cls: type[KvrelayError]) -> list[type[KvrelayError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _leaves(sub))]


def error_to_wire(error: BaseException) -> WireError:
    """Any exception as a wire error; the text of unknown ones stays in the log of its process."""
    if isinstance(error, KvrelayError):
        return WireError(error.code, error.message)
    return WireError(InternalError.code, f"internal error ({type(error).__name__})")


def error_from_wire(wire: WireError) -> KvrelayError:
    """The inverse; a code from a newer peer becomes `InternalError` and keeps its name in the text."""
    for cls in _leaves(KvrelayError):
        if cls.__dict__.get("code") == wire.code and not cls.__subclasses__():
            return cls(wire.message)
    for cls in _leaves(KvrelayError):
        if cls.__dict__.get("code") == wire.code:
            return cls(wire.message)
    return InternalError(f"{wire.code}: {wire.message}")
