"""What the supervisor decides, as a pure function of what happened. No process, no clock, no I/O.

```
            router listens        all workers ready
  ROUTER ────────────────► WORKERS ───────────────► SERVING
     │                        │                        │
     │ a first start fails    │                        │ stop requested
     ▼                        ▼                        ▼
  CLOSING ◄───────────────────┴──────────────────── DRAINING     stop again, or grace over
     │      every child gets SIGTERM     router gone   │        ────────► KILLING (SIGKILL)
     ▼                                                 ▼
   DONE   when no child is left
```

Workers come and go while the stack serves, as `ScaleTo` says; which of them run from the start is said
at construction.

DRAINING stops the router first: it refuses new requests and waits for the open ones, which still need
their workers. A child that dies while SERVING is started again, at once and then with growing pauses.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto

STABLE_S = 30.0
"""A child that was ready for this long starts its back-off anew."""
MAX_BACKOFF_S = 30.0


class Phase(Enum):
    """Where the whole stack is."""

    ROUTER = auto()
    WORKERS = auto()
    SERVING = auto()
    DRAINING = auto()
    CLOSING = auto()
    KILLING = auto()
    DONE = auto()


# --- events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """Start everything."""


@dataclass(frozen=True, slots=True)
class RouterListening:
    """The router accepts workers."""


@dataclass(frozen=True, slots=True)
class Health:
    """What the router's health page said."""

    ready: bool
    connected: frozenset[str] | None
    """Names of the workers that said hello; None where the page does not say."""
    at: float


@dataclass(frozen=True, slots=True)
class Exited:
    """A child ended: an exit status, or minus a signal's number."""

    name: str
    status: int
    at: float


@dataclass(frozen=True, slots=True)
class WakeDue:
    """The pause asked for by `Wake` is over."""

    name: str


@dataclass(frozen=True, slots=True)
class StopRequested:
    """SIGINT, SIGTERM, or the owner's call."""


@dataclass(frozen=True, slots=True)
class GraceOver:
    """Draining took as long as it may."""


@dataclass(frozen=True, slots=True)
class ScaleTo:
    """These workers are wanted from now on, and no others."""

    workers: frozenset[str]


Event = Begin | RouterListening | Health | Exited | WakeDue | ScaleTo | StopRequested | GraceOver


# --- actions ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a child."""

    name: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Send `WakeDue(name)` after a pause."""

    name: str
    after_s: float


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGTERM: finish what is open, then end."""

    name: str


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL to the child's whole process group."""

    name: str


@dataclass(frozen=True, slots=True)
class StartGrace:
    """Send `GraceOver` after the time this phase may take; replaces an earlier one."""

    phase: Phase


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the user about a change of phase."""

    phase: Phase


@dataclass(frozen=True, slots=True)
class Finish:
    """No child is left."""

    failed: str | None
    """The child whose first start failed."""
    killed: bool


Action = Spawn | Wake | Terminate | Kill | StartGrace | Announce | Finish


# --- the machine ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Child:
    name: str
    wanted: bool = True
    alive: bool = False
    stopping: bool = False
    """It was told to end, since nobody wanted it."""
    ready_at: float | None = None
    """When the running incarnation was first seen ready."""
    was_ready: bool = False
    """Some incarnation was."""
    failures: int = 0
    """Ends in a row without a stable stretch between them."""


class SupervisorMachine:
    """One router and its workers. `handle` turns an event into the actions it calls for."""

    def __init__(
        self, router: str, workers: Sequence[str], wanted: Collection[str] | None = None
    ) -> None:
        """Args: `wanted` are the workers that run from the start; None: all."""
        self.phase = Phase.ROUTER
        self._router = _Child(router)
        self._workers = [_Child(name, wanted is None or name in wanted) for name in workers]
        self._children = {child.name: child for child in (self._router, *self._workers)}
        self._failed: str | None = None

    def handle(self, event: Event) -> list[Action]:
        match event:
            case Begin():
                # All at once: workers load their weights while the router starts, then dial it.
                wanted = [child for child in self._children.values() if child.wanted]
                return [action for child in wanted for action in self._spawn(child)]
            case RouterListening():
                return self._router_listening()
            case Health():
                return self._health(event)
            case Exited():
                return self._exited(event)
            case WakeDue(name):
                child = self._children[name]
                running = self.phase in {Phase.WORKERS, Phase.SERVING}
                return self._spawn(child) if running and child.wanted and not child.alive else []
            case ScaleTo(names):
                return self._scale_to(names)
            case StopRequested():
                return self._stop()
            case GraceOver():
                return self._kill() if self.phase in {Phase.DRAINING, Phase.CLOSING} else []

    def alive(self) -> list[str]:
        return [child.name for child in self._children.values() if child.alive]

    def missing(self) -> list[str]:
        """Workers the stack still waits for."""
        return [child.name for child in self._workers if child.wanted and child.ready_at is None]

    def _spawn(self, child: _Child) -> list[Action]:
        child.alive = True
        child.stopping = False
        child.ready_at = None
        return [Spawn(child.name)]

    def _router_listening(self) -> list[Action]:
        self._router.was_ready = True
        if self.phase is not Phase.ROUTER:
            return []
        self.phase = Phase.WORKERS
        return [Announce(Phase.WORKERS)]

    def _health(self, event: Health) -> list[Action]:
        if self.phase not in {Phase.WORKERS, Phase.SERVING}:
            return []
        self._mark_ready(self._router, event.at)
        for worker in self._workers:
            if worker.name in event.connected if event.connected is not None else event.ready:
                self._mark_ready(worker, event.at)
        if self.phase is Phase.WORKERS and event.ready and not self.missing():
            self.phase = Phase.SERVING
            return [Announce(Phase.SERVING)]
        return []

    def _mark_ready(self, child: _Child, at: float) -> None:
        if child.alive and child.ready_at is None:
            child.ready_at = at
            child.was_ready = True

    def _scale_to(self, names: Collection[str]) -> list[Action]:
        if self.phase not in {Phase.ROUTER, Phase.WORKERS, Phase.SERVING}:
            return []
        actions: list[Action] = []
        for worker in self._workers:
            newly = worker.name in names and not worker.wanted
            worker.wanted = worker.name in names
            if newly and not worker.alive:
                worker.failures = 0
                actions += self._spawn(worker)
            elif not worker.wanted and worker.alive and not worker.stopping:
                worker.stopping = True
                actions.append(Terminate(worker.name))
        return actions

    def _exited(self, event: Exited) -> list[Action]:
        child = self._children[event.name]
        child.alive = False
        ready_at, child.ready_at = child.ready_at, None
        running = self.phase in {Phase.ROUTER, Phase.WORKERS, Phase.SERVING}
        if running and child.stopping:  # wanted again meanwhile, perhaps
            return self._spawn(child) if child.wanted else []
        match self.phase:
            case Phase.ROUTER | Phase.WORKERS if not child.was_ready:
                self._failed = child.name
                return self._close()
            case Phase.WORKERS | Phase.SERVING:
                if ready_at is not None and event.at - ready_at >= STABLE_S:
                    child.failures = 0
                pause = backoff_s(child.failures)
                child.failures += 1
                return [Wake(child.name, pause)] if pause else self._spawn(child)
            case Phase.DRAINING if child is self._router:
                return self._close()
            case _:
                return self._finish_if_empty()

    def _stop(self) -> list[Action]:
        match self.phase:
            case Phase.ROUTER | Phase.WORKERS:
                return self._close()
            case Phase.SERVING if self._router.alive:
                self.phase = Phase.DRAINING
                return [
                    Announce(Phase.DRAINING),
                    StartGrace(Phase.DRAINING),
                    Terminate(self._router.name),
                ]
            case Phase.SERVING:
                return self._close()
            case Phase.DRAINING | Phase.CLOSING:
                return self._kill()
            case _:
                return []

    def _close(self) -> list[Action]:
        self.phase = Phase.CLOSING
        alive = self.alive()
        if not alive:
            return self._finish_if_empty()
        return [
            Announce(Phase.CLOSING),
            StartGrace(Phase.CLOSING),
            *(Terminate(name) for name in alive),
        ]

    def _kill(self) -> list[Action]:
        self.phase = Phase.KILLING
        return [Announce(Phase.KILLING), *(Kill(name) for name in self.alive())]

    def _finish_if_empty(self) -> list[Action]:
        if self.alive():
            return []
        killed = self.phase is Phase.KILLING
        self.phase = Phase.DONE
        return [Finish(self._failed, killed)]


def backoff_s(failures: int) -> float:
    """Pause before the next start: 0 first, then 1, 2, 4 ... up to the limit."""
    return 0.0 if failures == 0 else min(MAX_BACKOFF_S, 2.0 ** (failures - 1))
