"""Where each request goes, and who waits for a place: in line, between two workers, or for a pool at zero.

The rules are elsewhere and pure: `placement` (which workers), `admission` (how long the line may be),
`parking` (what is told while a pool wakes). This is who applies them, with the line and the timers.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Mapping

from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.requests import actions, events
from kvrelay_router.requests.admission import DrainRate, WaitingLine
from kvrelay_router.requests.flight import Flight
from kvrelay_router.requests.machine import State
from kvrelay_router.requests.parking import Parking
from kvrelay_router.requests.placement import Demand, Role, place


class Placing:
    """Owns the line and the attempts that run. Tells a request what became of its search through `feed`."""

    def __init__(
        self,
        config: RouterConfig,
        registry: WorkerRegistry,
        *,
        clock: Callable[[], float],
        feed: Callable[[Flight, events.Event], None],
    ) -> None:
        self.parking = Parking(config)
        self._config = config
        self._registry = registry
        self._clock = clock
        self._feed = feed
        self._running: dict[int, Flight] = {}
        self._line: WaitingLine[Flight] = WaitingLine(max(1, config.max_queue))
        self._replaying: dict[Flight, None] = {}
        self._rate = DrainRate()
        self._pump_scheduled = False

    @property
    def running(self) -> Mapping[int, Flight]:
        """Requests that have their workers, by the sequence id of the attempt."""
        return self._running

    @property
    def waiting(self) -> tuple[Flight, ...]:
        """Requests that have none: the line, then those that lost theirs."""
        return (*self._line, *self._replaying)

    @property
    def parked(self) -> Iterable[Flight]:
        """Those that wait for a pool at zero."""
        return (flight for flight in self._line if flight.machine.state is State.PARKED)

    @property
    def awake(self) -> bool:
        """Whether a decode worker is there that takes work."""
        links = self._registry.links
        return any(k.role is Role.DECODE and k.awake and not k.draining for k in links)

    def check_room(self) -> None:
        """Raises: QueueFull: the line is as long as it may be."""
        self._line.check_room(self._rate)

    def find(self, flight: Flight, find: actions.FindPlace) -> events.Event | None:
        """Begin a search; returns how it ended, None where the request waits and has nothing to be told."""
        self.leave(flight)
        flight.find = find
        if find.cause is not None:
            flight.trace.replaying(find.cause, find.attempt, len(flight.machine.emitted))
        # Whoever came first goes first; a replay came before everyone in line.
        found = None if find.cause is None and self._line else self._try(flight)
        if found is not None:
            return found
        if find.cause is not None:
            self._wait(flight, find.wait_s)
            self._replaying[flight] = None
            return None
        parked = not self.awake
        self._wait(flight, self.parking.wait_s(flight.request, find.wait_s, parked=parked))
        position = self._line.add(flight)
        self.parking.demand()
        eta = None if parked else self._rate.eta_s(position)
        return events.NoPlace(self._clock(), position, eta, parked=parked)

    def leave(self, flight: Flight) -> None:
        """From here on messages about the attempt find nobody."""
        self._running.pop(flight.sequence_id, None)
        for link in flight.links:
            link.leave(flight.sequence_id)
        flight.sequence_id = 0
        flight.links = ()

    def ended(self, flight: Flight, at: float) -> None:
        """The request needs no place any more; another one may have its."""
        self.leave(flight)
        self._stop_waiting(flight)
        flight.find = None
        if flight.deadline is not None:
            flight.deadline.cancel()
        self._rate.ended(at)
        self.look_again()

    def set_deadline(self, flight: Flight, seconds: float) -> None:
        """How long the request may run from now on."""
        if flight.deadline is not None:
            flight.deadline.cancel()
        flight.deadline = asyncio.get_running_loop().call_later(
            seconds, lambda: self._feed(flight, events.DeadlineReached(self._clock()))
        )

    def look_again(self) -> None:
        """Room may have come free: look at the line once this tick's work is done."""
        if self._pump_scheduled or not (self._line or self._replaying):
            return
        self._pump_scheduled = True
        asyncio.get_running_loop().call_soon(self._pump)

    # ---- a pool at zero

    def begin_parking(self, flight: Flight) -> None:
        """Its time to run stops, and it hears what the others have heard."""
        if flight.machine.state is not State.PARKED or not self.parking.wakes:
            return
        if flight.deadline is not None:
            flight.deadline.cancel()
        now = self._clock()
        for start in self.parking.under_way(now):
            self._feed(flight, events.StartProgress(now, start))

    def park(self) -> None:
        """The last decode worker is gone: what waits for a place waits for the next one."""
        if not self.parking.wakes:
            return
        now = self._clock()
        for position, flight in enumerate(self._line, 1):
            self._wait(flight, self.parking.wait_s(flight.request, 0.0, parked=True))
            self._feed(flight, events.NoPlace(now, position, None, parked=True))
            self.begin_parking(flight)
        self.parking.demand()

    def unpark(self) -> None:
        """A decode worker is there: time to run begins for all that waited for one."""
        now = self._clock()
        for flight in self.parked:
            if flight.find is None:
                continue
            self._feed(flight, events.PoolAwake(now))
            self.set_deadline(flight, flight.machine.deadline_at - now)
            wait_s = self.parking.wait_s(flight.request, flight.find.wait_s, parked=False)
            self._wait(flight, wait_s)

    def tell_parked(self, event: events.StartProgress) -> None:
        """How far the start is that they wait for."""
        for flight in self._line:
            self._feed(flight, event)

    # ---- one search

    def _try(self, flight: Flight) -> events.PlaceFound | None:
        find, machine = flight.find, flight.machine
        if find is None:
            return None
        flight.search_ns = time.time_ns()
        tokens = len(flight.request.prompt_tokens) + len(machine.emitted)
        demand = Demand(
            tokens,
            replay=find.cause is not None,
            local_only=find.local_only,
            avoid=find.avoid,
            force_path=flight.request.force_path,
        )
        path = place(demand, self._registry.states(), self._config)
        if path is None:
            return None
        self._stop_waiting(flight)
        names = (path.decode_worker, path.prefill_worker)
        flight.links = tuple(k for k in self._registry.links if k.name in names)
        flight.sequence_id = self._new_sequence_id()
        self._running[flight.sequence_id] = flight
        for link in flight.links:
            link.dispatch(flight.sequence_id, tokens)
        return events.PlaceFound(self._clock(), flight.sequence_id, path)

    def _new_sequence_id(self) -> int:
        """Unguessable, and never one that is in use."""
        while True:
            sequence_id = secrets.randbits(64)
            if sequence_id and sequence_id not in self._running:
                return sequence_id

    def _wait(self, flight: Flight, wait_s: float) -> None:
        if flight.place_timer is not None:
            flight.place_timer.cancel()
        flight.wait_s = wait_s
        flight.place_timer = asyncio.get_running_loop().call_later(wait_s, self._timed_out, flight)

    def _stop_waiting(self, flight: Flight) -> None:
        self._line.discard(flight)
        self._replaying.pop(flight, None)
        if flight.place_timer is not None:
            flight.place_timer.cancel()
            flight.place_timer = None

    def _timed_out(self, flight: Flight) -> None:
        if flight.find is None:
            return
        now, attempt = self._clock(), flight.find.attempt
        waking = self.parking.wakes and flight.machine.state is State.PARKED
        retry_after = (
            self.parking.retry_after_s(now) if waking else self._rate.retry_after_s(len(self._line))
        )
        self._feed(flight, events.PlaceTimedOut(now, attempt, retry_after, flight.wait_s, waking))

    def _pump(self) -> None:
        self._pump_scheduled = False
        for flight in tuple(self._replaying):
            self._pump_one(flight)
        for flight in self._line:
            if not self._pump_one(flight) and flight.request.force_path is None:
                return  # first come, first served

    def _pump_one(self, flight: Flight) -> bool:
        """Returns False where it has to go on waiting."""
        if flight.find is None:
            return True  # ended meanwhile
        found = self._try(flight)
        if found is None:
            return False
        self._feed(flight, found)
        return True
