"""What the machine wants done; carried out by `service.py`, those for workers through `wire.py`."""

from dataclasses import dataclass

from kvrelay_protocol.fleet_pb2 import Lease
from kvrelay_router.requests.types import RequestEvent


@dataclass(frozen=True, slots=True)
class FindPlace:
    """Find workers; answer with `PlaceFound`, or `NoPlace` and within `wait_s` one of the others."""

    attempt: int
    wait_s: float
    local_only: bool = False
    """KV of this request failed to arrive before: let the decode worker compute it."""
    avoid: frozenset[str] = frozenset()
    """Workers to prefer others over."""
    cause: str | None = None
    """Error code that ended the attempt before, or None for the first."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What both workers are told of one attempt; `tokens` ends with the `output_offset` emitted ones."""

    sequence_id: int
    tokens: tuple[int, ...]
    output_offset: int
    max_tokens: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class SubmitDecode:
    """Dispatch to the decode worker."""

    worker: str
    attempt: Attempt
    expect_kv: bool


@dataclass(frozen=True, slots=True)
class SubmitPrefill:
    """Dispatch to the prefill worker."""

    worker: str
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class OpenTransfer:
    """Hand the decode worker's lease to the prefill worker."""

    worker: str
    sequence_id: int
    lease: Lease


@dataclass(frozen=True, slots=True)
class ResendKv:
    """Ask the prefill worker for messages that arrived corrupt."""

    worker: str
    sequence_id: int
    messages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AllSent:
    """Tell the decode worker that nothing more is on its way to it."""

    worker: str
    sequence_id: int


@dataclass(frozen=True, slots=True)
class ReleaseKv:
    """The decode worker has everything: the prefill worker may let go."""

    worker: str
    sequence_id: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop the sequence and whatever it holds."""

    worker: str
    sequence_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class OutOfStep:
    """A worker sent what does not follow from what it was told: count it."""

    worker: str
    what: str


@dataclass(frozen=True, slots=True)
class Emit:
    """An event for the client's stream."""

    event: RequestEvent


FollowUp = OpenTransfer | ResendKv | AllSent | ReleaseKv | Cancel
WorkerAction = SubmitDecode | SubmitPrefill | FollowUp
Action = WorkerAction | FindPlace | OutOfStep | Emit
