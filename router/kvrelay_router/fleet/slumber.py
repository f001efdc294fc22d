"""Whether a joined worker is awake, as far as the router knows.

```
           retire()               sleep()               told: asleep
   AWAKE ───────────► RETIRING ───────────► FALLING ────────────────► ASLEEP
    ▲ ▲ ▲    wake()      │                     │ told: awake              │ wake(), from FALLING too
    │ │ └────────────────┘                     │ (it had work)            ▼
    │ └────────────────────────────────────────┘                       WAKING
    └──────────────────────────── told: awake ────────────────────────────┘
```
"""

from enum import StrEnum

from kvrelay_protocol import fleet_pb2 as pb


class Rest(StrEnum):
    """Of one worker. Only one that is awake is given work."""

    AWAKE = "awake"
    RETIRING = "retiring"
    """It finishes what it has, and sleeps then. It was told nothing yet."""
    FALLING = "falling asleep"
    ASLEEP = "asleep"
    WAKING = "waking"


class Slumber:
    """Orders are numbered: an answer to another one than the last is of no account any more."""

    def __init__(self, *, asleep: bool) -> None:
        self.rest = Rest.ASLEEP if asleep else Rest.AWAKE
        self._order = 0

    @property
    def awake(self) -> bool:
        return self.rest is Rest.AWAKE

    def retire(self) -> None:
        """It gets no more work."""
        if self.rest is Rest.AWAKE:
            self.rest = Rest.RETIRING

    def sleep(self) -> pb.RouterMessage | None:
        """What to send to a worker that shall sleep; None where that is no change."""
        if self.rest in {Rest.FALLING, Rest.ASLEEP}:
            return None
        self.rest = Rest.FALLING
        self._order += 1
        return pb.RouterMessage(sleep=pb.Sleep(order=self._order))

    def wake(self) -> pb.RouterMessage | None:
        """What to send to a worker that shall work; None where it needs no word."""
        if self.rest is Rest.RETIRING:
            self.rest = Rest.AWAKE
        if self.rest in {Rest.AWAKE, Rest.WAKING}:
            return None
        self.rest = Rest.WAKING
        self._order += 1
        return pb.RouterMessage(wake=pb.Wake(order=self._order))

    def told(self, state: pb.SleepState) -> bool:
        """The worker says what it does. Returns whether that was news."""
        if state.order != self._order:
            return False  # said before the last order came to it
        if self.rest is Rest.RETIRING and not state.asleep:
            return False
        before, self.rest = self.rest, Rest.ASLEEP if state.asleep else Rest.AWAKE
        return before is not self.rest
