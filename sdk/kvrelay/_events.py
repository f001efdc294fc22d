"""What a stream yields. Every event is frozen; a `match` statement takes it apart."""

import json
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits for a worker."""

    position: int
    eta_s: float | None = None


@dataclass(frozen=True, slots=True)
class ColdStart:
    """No worker was up: one starts or wakes up, and the request waits for it."""

    pool: str
    """`prefill` or `decode`."""
    phase: str
    """`wake` where one that sleeps wakes up; else `requested`, then what the worker does: `import`, `check_device`,
    `load_weights`, `warm_up`, `start_transport`."""
    done: int = 0
    """Bytes of the phase, where it counts them."""
    total: int = 0
    eta_s: float | None = None
    """Seconds left, were it to take as long as the last start; None before the first."""


@dataclass(frozen=True, slots=True)
class Started:
    """Workers were chosen and the prompt is being read."""

    path: str
    """`disaggregated` (prefilled on one worker, decoded on another) or `local`."""
    reason: str = ""
    prefill_worker: str | None = None
    decode_worker: str = ""
    cached_tokens: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of the answer."""

    text: str
    snapshot: str = ""
    """The answer so far, this piece included."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """A worker was lost; another one carries on where it stopped. No text is lost or repeated."""

    gap_s: float
    from_index: int
    """Tokens the answer had when the worker was lost."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete; usage may still follow."""

    reason: str
    """`stop`, `length`, or whatever a newer server says."""


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """Something this version of the client does not know; kept, never an error."""

    name: str
    """The SSE event name; empty for an unnamed frame."""
    raw: str
    """The data as it came."""

    def json(self) -> Any:
        """The data, parsed; raises `ValueError` where it is no JSON."""
        return json.loads(self.raw)


Event: TypeAlias = (
    Queued | ColdStart | Started | TextDelta | Resumed | Usage | Finished | UnknownEvent
)
"""Everything a stream can yield. It grows with the product: keep a default case."""
