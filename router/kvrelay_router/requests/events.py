"""What can happen to a request; the machine's input. `at` is a monotonic time in seconds."""

from dataclasses import dataclass

from kvrelay_protocol.errors import KvrelayError
from kvrelay_protocol.fleet_pb2 import Lease
from kvrelay_router.requests.types import ColdStart, FinishReason, Path


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request passed admission; ask for a place."""

    at: float


@dataclass(frozen=True, slots=True)
class NoPlace:
    """No worker can take the request now."""

    at: float
    position: int
    eta_s: float | None
    parked: bool
    """No decode worker is there at all (as opposed to: all are full)."""


@dataclass(frozen=True, slots=True)
class StartProgress:
    """A worker of a pool that sleeps is on its way."""

    at: float
    start: ColdStart


@dataclass(frozen=True, slots=True)
class PoolAwake:
    """The first decode worker is there: what was parked has its whole time to run before it."""

    at: float


@dataclass(frozen=True, slots=True)
class PlaceFound:
    """Workers for the next attempt, which both workers will know as `sequence_id`."""

    at: float
    sequence_id: int
    path: Path


@dataclass(frozen=True, slots=True)
class PlaceTimedOut:
    """The wait that `FindPlace` allowed for this attempt is over."""

    at: float
    attempt: int
    retry_after_s: float
    waited_s: float | None = None
    """What a first attempt was allowed to wait, where that is not the queue's own limit."""
    waking: bool = False
    """The pool was at zero all that time, and somebody starts a worker."""


@dataclass(frozen=True, slots=True)
class SequenceStarted:
    """A worker begins to compute."""

    at: float
    sequence_id: int
    worker: str
    cached_tokens: int
    queue_seconds: float
    """From its dispatch, by the worker's clock: the message itself may come later."""


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """The decode worker reserved blocks; the prefill worker may push into them."""

    at: float
    sequence_id: int
    worker: str
    lease: Lease


@dataclass(frozen=True, slots=True)
class TokensArrived:
    """New output tokens of one sequence; `finish` where the last of them ends the answer."""

    at: float
    sequence_id: int
    worker: str
    first_index: int
    tokens: tuple[int, ...]
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class KvSent:
    """The prefill worker's last KV message left."""

    at: float
    sequence_id: int
    worker: str
    bytes: int
    seconds: float
    prefill_seconds: float
    transport: str


@dataclass(frozen=True, slots=True)
class KvReceived:
    """The decode worker has and verified every KV block and the handover record."""

    at: float
    sequence_id: int
    worker: str
    bytes: int
    seconds: float
    exposed_seconds: float
    transport: str


@dataclass(frozen=True, slots=True)
class KvMissing:
    """KV messages that failed their digest."""

    at: float
    sequence_id: int
    worker: str
    messages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """A worker gave the sequence up; it holds nothing of it any more."""

    at: float
    sequence_id: int
    worker: str
    error: KvrelayError


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """A worker's stream broke or fell silent."""

    at: float
    worker: str
    why: str
    drained: bool = False
    """It had said that it would go: what it still ran is handed over."""


@dataclass(frozen=True, slots=True)
class DeadlineReached:
    """The request's time is up."""

    at: float


@dataclass(frozen=True, slots=True)
class ClientCancelled:
    """Nobody is left to answer."""

    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class StoppedEarly:
    """The edge found a stop string: the answer is complete."""

    at: float


@dataclass(frozen=True, slots=True)
class ShutDown:
    """The drain's grace is over."""

    at: float


@dataclass(frozen=True, slots=True)
class Broken:
    """A defect of ours hit this request; `what` is fit for the client."""

    at: float
    what: str


WorkerEvent = (
    SequenceStarted
    | LeaseGranted
    | TokensArrived
    | KvSent
    | KvReceived
    | KvMissing
    | SequenceFailed
)
Event = (
    WorkerEvent
    | Admitted
    | NoPlace
    | StartProgress
    | PoolAwake
    | PlaceFound
    | PlaceTimedOut
    | WorkerGone
    | DeadlineReached
    | ClientCancelled
    | StoppedEarly
    | ShutDown
    | Broken
)
