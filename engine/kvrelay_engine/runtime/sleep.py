"""A worker that sleeps: the process stays and stays joined, memory goes back until somebody needs it.

```
            sleep, nothing under way                engine thread done
   AWAKE ───────────────────────────► falling asleep ────────────────► ASLEEP
     ▲  ▲                                   │ the engine had work after all   │ wake, or work
     │  └───────────────────────────────────┘                                 ▼
     └───────────────────────────────────────────────────────────────── waking up
```

Orders come on the event loop and are carried out on the engine thread, in the order in which they and
the work came: what was submitted behind an order meets its outcome.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvrelay_engine.runtime.startup import Engine
from kvrelay_engine.runtime.step_loop import LoadSnapshot
from kvrelay_protocol import fleet_pb2 as pb

log = logging.getLogger(__name__)

WORK = frozenset({"submit_prefill", "submit_decode"})
"""Messages that a worker must be awake for."""


@dataclass(slots=True)
class Sleeper:
    """Lives on the event loop's thread, but for `_fall` and `_rise`."""

    engine: Engine
    load: Callable[[], LoadSnapshot]
    """The scheduler's. Engine thread."""
    busy: Callable[[], bool]
    """Whether a sequence, lease or transfer is open."""
    post: Callable[[Callable[[], None]], None]
    """Runs a command on the engine thread, in order."""
    send: Callable[[pb.WorkerMessage, int], None]
    say: Callable[[str], None]
    """One line to the operator."""
    asleep: bool = False
    """As the engine thread said last."""
    _will_sleep: bool = False
    """As it is when all that was posted has run."""
    _has_slept: bool = False
    _orders: dict[int, int] = field(default_factory=dict)
    """The last order of each joined session."""
    _posted: int = 0
    """Commands that the engine thread has not carried out yet."""
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def joined(self, session: int) -> None:
        """A router took this worker. What the hello said of its sleep may be over by now."""
        self._orders[session] = 0
        if self._has_slept and not self._posted:
            self._tell(session)

    def left(self, session: int) -> None:
        self._orders.pop(session, None)

    def sleep(self, session: int, order: int) -> None:
        """A router needs this worker no more for now."""
        self._orders[session] = order
        if not self._will_sleep and not self.busy():
            self._will_sleep = True
            self._post(self._fall)
        self._settle()

    def wake(self, session: int, order: int) -> None:
        """A router needs this worker."""
        self._orders[session] = order
        self.rouse()
        self._settle()

    def rouse(self) -> None:
        """Work is here: whatever was ordered, the engine is awake before what is posted next."""
        if self._will_sleep:
            self._will_sleep = False
            self._post(self._rise)

    def _post(self, command: Callable[[], bool]) -> None:
        self._posted += 1

        def run() -> None:
            begun = time.monotonic()
            asleep = command()
            seconds = time.monotonic() - begun
            self._loop.call_soon_threadsafe(self._done, asleep, seconds)

        self.post(run)

    def _done(self, asleep: bool, seconds: float) -> None:
        self._posted -= 1
        if asleep != self.asleep:
            self.asleep = asleep
            self._has_slept = True
            self.say(f"{'asleep' if asleep else 'awake'} after {seconds:.3f} s")
        if not self._posted:
            self._will_sleep = asleep  # the engine may have had work after all
        self._settle()

    def _settle(self) -> None:
        """Say what is, unless it is about to change."""
        if not self._posted:
            for session in self._orders:
                self._tell(session)

    def _tell(self, session: int) -> None:
        state = pb.SleepState(asleep=self.asleep, order=self._orders[session])
        self.send(pb.WorkerMessage(sleep_state=state), session)

    # ---- engine thread

    def _fall(self) -> bool:
        """Returns whether the engine sleeps now."""
        if _has_work(self.load()):
            return False
        self.engine.allocator.clear()
        try:
            self.engine.runner.sleep()
        except (
            RuntimeError
        ) as error:  # no memory in the host: to be awake is better than to be gone
            log.warning("can't sleep: %s", error)
            return False
        return True

    def _rise(self) -> bool:
        self.engine.runner.wake()
        return False


def _has_work(load: LoadSnapshot) -> bool:
    return any((load.running, load.waiting, load.leased_blocks, load.used_blocks))
