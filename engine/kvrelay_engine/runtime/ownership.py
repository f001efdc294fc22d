"""Whose a sequence is: a worker serves several routers, one after the other and at once.

Each joined stream is a *session*, numbered by the worker. Inside the worker a sequence's id is

```
own id = session << 64 | the id that the router of that session chose
```

so two routers, or one before and after its restart, can choose what they like.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kvrelay_protocol import fleet_pb2 as pb

_WIRE_BITS = 64
_WIRE_MASK = (1 << _WIRE_BITS) - 1


def own_id(session: int, sequence_id: int) -> int:
    """What a router's sequence is called in this worker."""
    return session << _WIRE_BITS | sequence_id


def wire_id(own: int) -> int:
    """What the sequence's router calls it."""
    return own & _WIRE_MASK


def session_of(own: int) -> int:
    """Whose it is."""
    return own >> _WIRE_BITS


@dataclass(frozen=True, slots=True)
class Difference:
    """What a router has in flight on this worker, beside what this worker has. Own ids."""

    orphans: tuple[int, ...]
    """Held here, and their router has them no more."""
    stalled: frozenset[int]
    """Held here and alive, and nobody computes their KV just now."""
    going: frozenset[int]
    """The others held here and alive."""
    unknown: tuple[int, ...]
    """Alive at the router and not here."""


def compare(pulse: pb.Pulse, session: int, held: Iterable[int]) -> Difference:
    """A pulse beside what is held; `held` may have other sessions' sequences too."""
    mine = {own for own in held if session_of(own) == session}
    live = {own_id(session, sequence_id) for sequence_id in pulse.live}
    stalled = frozenset(own_id(session, sequence_id) for sequence_id in pulse.stalled) & mine
    going = frozenset(mine & live) - stalled
    return Difference(tuple(mine - live), stalled, going, tuple(live - mine))
