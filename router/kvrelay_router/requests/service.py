"""The asyncio shell around the request machines: feeds them events and carries out their actions.

Everything runs on one event loop and nothing in here waits, apart from `drain`. A worker's message is
handled to the end, for every sequence in it, before the loop goes on: a lost worker's requests are
re-placed in the tick that noticed.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import Draining, KvrelayError, WorkerLost
from kvrelay_protocol.telemetry import Telemetry
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.registry import StartingWorker, WorkerRegistry
from kvrelay_router.fleet.slumber import Rest
from kvrelay_router.fleet.worker_link import WorkerLink
from kvrelay_router.metrics import RouterMetrics
from kvrelay_router.requests import actions, events
from kvrelay_router.requests import machine as m
from kvrelay_router.requests.admission import DrainRate, WaitingLine
from kvrelay_router.requests.demand import FleetDemand
from kvrelay_router.requests.parking import Parking
from kvrelay_router.requests.placement import Demand, Role, blocks_needed, place
from kvrelay_router.requests.stream import EventStream
from kvrelay_router.requests.tracing import RequestTrace
from kvrelay_router.requests.types import (
    ColdStart,
    Failed,
    Finished,
    Health,
    Placed,
    RequestEvent,
    RequestStream,
    Resumed,
    Started,
    Tokens,
    ValidRequest,
    WorkerView,
)
from kvrelay_router.requests.wire import (
    pulse_message,
    router_message,
    sequence_of,
    submit_message,
    tokens_event,
    worker_event,
)
from kvrelay_router.scaling.meter import DemandMeter

logger = logging.getLogger(__name__)


class _Flight:
    """One admitted request until its terminal event. Owned by the service."""

    __slots__ = (
        "deadline",
        "find",
        "last_token_at",
        "links",
        "machine",
        "place_timer",
        "received_at",
        "request",
        "search_ns",
        "sequence",
        "sequence_id",
        "stream",
        "trace",
        "traceparent",
        "wait_s",
    )

    def __init__(
        self,
        request: ValidRequest,
        machine: m.RequestMachine,
        trace: RequestTrace,
        *,
        received_at: float,
    ) -> None:
        self.request = request
        self.machine = machine
        self.trace = trace
        self.traceparent = trace.context.traceparent
        self.received_at = received_at
        self.last_token_at: float | None = None
        self.sequence_id = 0
        """Of the current attempt; 0 between attempts."""
        self.sequence: pb.Sequence | None = None
        """What the workers of the latest attempt were told."""
        self.links: tuple[WorkerLink, ...] = ()
        """Workers of the current attempt."""
        self.find: actions.FindPlace | None = None
        """The search in progress."""
        self.search_ns = 0
        self.deadline: asyncio.TimerHandle | None = None
        self.place_timer: asyncio.TimerHandle | None = None
        self.wait_s = 0.0
        """What that timer was set to."""
        self.stream: EventStream


class RouterService:
    """Implements `RequestService` for the edge and `FleetListener` for the registry."""

    def __init__(
        self,
        config: RouterConfig,
        registry: WorkerRegistry,
        telemetry: Telemetry,
        metrics: RouterMetrics,
    ) -> None:
        self._config = config
        self._registry = registry
        self._telemetry = telemetry
        self._metrics = metrics
        self._clock = time.monotonic
        self._flights: set[_Flight] = set()
        self._by_sequence: dict[int, _Flight] = {}
        self._line: WaitingLine[_Flight] = WaitingLine(max(1, config.max_queue))
        self._replaying: dict[_Flight, None] = {}
        self._rate = DrainRate()
        self.parking = Parking(config)
        self._meter = DemandMeter()
        self._arrived = 0
        """Requests since the scaler last looked."""
        self._busy_at = self._prompt_at = self._clock()
        """When a request was last there, and when one that had no token yet."""
        self._block_size = 16
        """Of the last decode worker."""
        self._context_limit: int | None = None
        """What the last decode workers held: one that is started holds as much."""
        self._draining = False
        self._pump_scheduled = False
        self._generated = 0
        """Tokens of the step message in hand, added to the metric once per message."""
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.running.set_function(lambda: len(self._by_sequence))
        metrics.waiting.set_function(lambda: len(self._line) + len(self._replaying))

    # ---- for the edge

    def submit(self, request: ValidRequest) -> RequestStream:
        """Admit a request; see `RequestService.submit`."""
        try:
            if self._draining:
                raise Draining("the server is shutting down and takes no new requests")
            self._line.check_room(self._rate)
        except KvrelayError as error:
            self._metrics.rejections.labels(error.code).inc()
            raise
        now = self._clock()
        machine = m.RequestMachine(
            request,
            received_at=now,
            max_replays=self._config.max_replays,
            queue_timeout_s=self._config.queue_timeout_s,
            replay_wait_s=self._config.replay_wait_s,
        )
        flight = _Flight(request, machine, RequestTrace(self._telemetry, request), received_at=now)
        flight.stream = EventStream(
            flight.trace.context,
            on_cancel=lambda reason: self._feed(
                flight, events.ClientCancelled(self._clock(), reason)
            ),
            on_stop=lambda: self._feed(flight, events.StoppedEarly(self._clock())),
        )
        self._flights.add(flight)
        self._arrived += 1
        self._meter.arrived(now, len(request.prompt_tokens))
        self._idle.clear()
        self._set_deadline(flight, request.deadline_s)
        self._feed(flight, events.Admitted(now))
        return flight.stream

    def health(self) -> Health:
        views = tuple(_view(link) for link in self._registry.links)
        awake = self._decoders()
        ready = awake or self.parking.wakes
        if self._draining:
            return Health(ready=False, phase="draining", workers=views)
        return Health(
            ready=ready,
            phase="ready" if awake else "asleep" if ready else "no_decode_worker",
            workers=views,
            starting=tuple(worker.name for worker in self._registry.starting),
            max_model_len=self.context_limit(),
        )

    def context_limit(self) -> int | None:
        limits = [k.max_model_len for k in self._registry.links if k.role is Role.DECODE]
        self._context_limit = min(limits, default=self._context_limit)
        return self._context_limit

    # ---- for the owner

    async def drain(self, grace_s: float) -> None:
        """Admit nothing more; let streams end for `grace_s`, then fail the rest with `Draining`."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            for flight in tuple(self._flights):
                self._feed(flight, events.ShutDown(self._clock()))

    # ---- FleetListener

    def worker_joined(self, link: WorkerLink) -> None:
        self._metrics.worker_loads(link)
        self._metrics.fleet(self._registry.links)
        if link.awake:
            self._can_work(link, woken=False)
        elif not self.parking.wakes:
            self._registry.wake(
                link
            )  # it sleeps by the order of a router that scales; this one does not

    def worker_rests(self, link: WorkerLink) -> None:
        self._metrics.fleet(self._registry.links)
        if link.awake:
            self._can_work(link, woken=True)

    def _can_work(self, link: WorkerLink, *, woken: bool) -> None:
        """A worker has joined, or woken up."""
        # Who came for a request that went on without it gets its idle time all the same.
        self._busy_at = self._prompt_at = now = self._clock()
        self.parking.joined(link.role, now, woken=woken)
        if link.role is Role.DECODE:
            self._block_size = link.block_size
            self._unpark()
        self._schedule_pump()

    def worker_starting(self, starting: StartingWorker) -> None:
        now = self._clock()
        if (start := self.parking.progress(starting, now)) is not None:
            self._tell_parked(events.StartProgress(now, start))

    # ---- for the scaler

    def demand(self, now: float) -> FleetDemand:
        """What is in hand; the requests that came since the last call are counted once."""
        waiting = [*self._line, *self._replaying]
        tokens = [len(f.request.prompt_tokens) + len(f.machine.emitted) for f in waiting]
        if self._flights:
            self._busy_at = now
        if any(not f.machine.emitted for f in self._flights):
            self._prompt_at = now
        arrived, self._arrived = self._arrived, 0
        return FleetDemand(
            waiting=len(waiting),
            waiting_tokens=sum(tokens),
            waiting_blocks=sum(blocks_needed(count, self._block_size) for count in tokens),
            transferring=sum(f.machine.awaits_kv for f in self._by_sequence.values()),
            arrived=arrived,
            arriving_tokens_per_second=self._meter.tokens_per_second(now),
            idle_s=now - self._busy_at,
            prompts_idle_s=now - self._prompt_at,
            start_s=self.parking.starts.took_s,
            wake_s=self.parking.wakings.took_s,
        )

    def start_requested(self, pool: Role, *, wake: bool) -> None:
        """Workers of a pool that had none awake were asked for."""
        now = self._clock()
        parked = [f.received_at for f in self._line if f.machine.state is m.State.PARKED]
        if parked:
            self._metrics.queue_to_wake.observe(now - min(parked))
        self._tell_parked(events.StartProgress(now, self.parking.requested(pool, now, wake=wake)))

    def scaled(self, pool: Role, replicas: int, reason: str) -> None:
        """The provider took a new number of workers."""
        logger.info("%s: %d workers wanted (%s)", pool.value, replicas, reason)
        self._metrics.wanted(pool.value, replicas, reason)

    def scaling_failed(self, pool: Role) -> None:
        """It did not."""
        self._metrics.scaling_failures.labels(pool.value).inc()

    def worker_lost(self, link: WorkerLink, why: str) -> None:
        self._metrics.worker_left(link)
        self._metrics.fleet(self._registry.links)
        event = events.WorkerGone(self._clock(), link.name, why, drained=link.draining)
        for flight in tuple(self._by_sequence.values()):
            if link in flight.links:
                self._feed(flight, event)
        if link.role is Role.DECODE and not self._decoders():
            self._park()
        if not link.awake:
            self.parking.demand()  # it may have been kept for nobody, or been on its way to somebody

    def worker_message(self, link: WorkerLink, message: pb.WorkerMessage) -> None:
        now = self._clock()
        match message.WhichOneof("message"):
            case "step_output":
                self._step(now, link.name, message.step_output)
            case "heartbeat":
                self._metrics.worker_loads(link)
                self._not_there(now, link, message.heartbeat.unknown)
                self._registry.send(link.name, self._pulse(now, link))
                self._schedule_pump()
            case "drained":
                self._metrics.fleet(self._registry.links)
            case _:
                event = worker_event(now, link.name, message)
                if event is not None:
                    self._sequence_event(link, event)

    def message_repeated(self, link: WorkerLink) -> None:
        logger.warning("worker %s: a message came twice; dropped", link.name)
        self._metrics.join_fault("up", "repeated")

    def message_missing(self, link: WorkerLink) -> None:  # noqa: ARG002 - `worker_lost` names it
        self._metrics.join_fault("up", "missing")

    def _pulse(self, now: float, link: WorkerLink) -> pb.RouterMessage:
        """Every attempt that `link` must have now, and those of them whose KV nobody is computing: its
        worker is stuck, or has computed it and it doesn't come.
        """
        patience = self._config.lease_s / 2
        prefill = (k for k in self._registry.links if k.role is Role.PREFILL)
        stuck = {k.name for k in prefill if now - k.progress_at > patience}
        live: list[int] = []
        stalled: list[int] = []
        for sequence_id in link.attempts:
            machine = self._by_sequence[sequence_id].machine
            if not machine.holds(link.name):
                continue
            live.append(sequence_id)
            path = machine.path
            if path is None or not machine.awaits_kv:
                continue
            if path.prefill_worker in stuck or machine.prompt_computed:
                stalled.append(sequence_id)
        return pulse_message(live, stalled)

    def _not_there(self, now: float, link: WorkerLink, sequence_ids: Iterable[int]) -> None:
        """Sequences of the last pulse that their worker does not have.

        What it finished or failed before it said so has ended here as well: its stream is in order.
        """
        for sequence_id in sequence_ids:
            flight = self._by_sequence.get(sequence_id)
            if flight is None or not flight.machine.holds(link.name):
                continue
            self._metrics.unknown_sequences.inc()
            error = WorkerLost(f"worker {link.name} does not have the request any more")
            self._feed(flight, events.SequenceFailed(now, sequence_id, link.name, error))

    def _step(self, now: float, worker: str, step: pb.StepOutput) -> None:
        """The tokens of one engine step, all sequences. Most of them need nothing but to be passed on."""
        by_sequence = self._by_sequence
        gaps: dict[float, int] = {}  # sequences of a batch have the same
        passed_on = 0
        for run in step.runs:
            sequence_id = run.sequence_id
            flight = by_sequence.get(sequence_id)
            if flight is None:
                continue
            ids = run.tokens
            tokens = (ids[0],) if len(ids) == 1 else tuple(ids)
            last = flight.last_token_at
            if (
                last is None
                or run.finish
                or not flight.machine.take(sequence_id, worker, run.first_index, tokens)
            ):
                self._feed(flight, tokens_event(now, worker, run))
                continue
            flight.stream.put_tokens(tokens)
            gap = (now - last) / len(tokens)
            gaps[gap] = gaps.get(gap, 0) + 1
            flight.last_token_at = now
            passed_on += len(tokens)
        for gap, count in gaps.items():
            self._metrics.inter_token_latency.observe(gap, count)
        self._metrics.generation_tokens.inc(self._generated + passed_on)
        self._generated = 0

    def _sequence_event(self, link: WorkerLink, event: events.WorkerEvent) -> None:
        flight = self._by_sequence.get(event.sequence_id)
        if flight is None:
            return
        if isinstance(event, events.LeaseGranted | events.SequenceStarted) and link.pending.grant(
            event.sequence_id,
        ):
            self._schedule_pump()
        if isinstance(event, events.KvReceived):
            self._metrics.kv_received(event.bytes, event.seconds, event.transport)
        self._feed(flight, event)

    # ---- the shell

    def _feed(self, flight: _Flight, event: events.Event) -> None:
        """Hand an event to the machine and carry out what it answers."""
        try:
            for action in flight.machine.handle(event):
                answer = self._carry_out(flight, action, event.at)
                if answer is not None:  # to `FindPlace`, which is always the last action
                    self._feed(flight, answer)
                    if isinstance(answer, events.NoPlace):
                        self._begin_parking(flight)
        except Exception:
            logger.exception("defect", extra={"request_id": flight.request.request_id})
            if not isinstance(event, events.Broken):
                what = f"internal error, logged under request id {flight.request.request_id}"
                self._feed(flight, events.Broken(self._clock(), what))

    def _carry_out(self, flight: _Flight, action: actions.Action, at: float) -> events.Event | None:
        match action:
            case actions.Emit(event):
                self._emit(flight, event, at)
                return None
            case actions.FindPlace():
                return self._find_place(flight, action)
            case actions.OutOfStep(worker, what):
                logger.warning("worker %s was out of step: it %s", worker, what)
                self._metrics.out_of_step.inc()
                return None
            case actions.SubmitDecode() | actions.SubmitPrefill():
                sequence = self._sequence(flight, action.attempt)
                message = submit_message(action, sequence, lease_s=self._config.lease_s)
                self._registry.send(action.worker, message)
                return None
            case _:
                self._registry.send(action.worker, router_message(action))
                return None

    def _sequence(self, flight: _Flight, attempt: actions.Attempt) -> pb.Sequence:
        """Made once for both workers of an attempt."""
        made = flight.sequence
        if made is None or made.sequence_id != attempt.sequence_id:
            made = sequence_of(attempt, flight.request, flight.traceparent)
            flight.sequence = made
        return made

    def _emit(self, flight: _Flight, event: RequestEvent, at: float) -> None:
        # The client comes first: a defect in the book-keeping below must not cost it the event.
        flight.stream.put(event)
        match event:
            case ColdStart(phase=phase):
                flight.trace.cold_start(phase)
            case Started(cached_tokens):
                prompt = len(flight.request.prompt_tokens)
                self._meter.computed(at, prompt=prompt, cached=cached_tokens)
            case Tokens(ids):
                self._generated += len(ids)
                if flight.last_token_at is None:
                    self._metrics.time_to_first_token.observe(at - flight.received_at)
                else:
                    gap = (at - flight.last_token_at) / len(ids)
                    self._metrics.inter_token_latency.observe(gap)
                flight.last_token_at = at
            case Resumed(gap_s):
                self._metrics.replay_gap.observe(gap_s)
            case Placed(path, attempt):
                cause = flight.find.cause if flight.find else None
                flight.find = None
                self._metrics.placed(path, replay_cause=cause)
                if attempt == 0:
                    self._metrics.queue_time.observe(at - flight.received_at)
                    self._metrics.prompt_tokens.inc(len(flight.request.prompt_tokens))
                flight.trace.placed(path, attempt, started_ns=flight.search_ns)
            case Finished() | Failed():
                self._ended(flight, event, at)

    def _ended(self, flight: _Flight, event: Finished | Failed, at: float) -> None:
        self._leave_attempt(flight)
        self._stop_waiting(flight)
        flight.find = None
        if flight.deadline is not None:
            flight.deadline.cancel()
        self._flights.discard(flight)
        if not self._flights:
            self._idle.set()
        self._rate.ended(at)
        self._schedule_pump()
        self._metrics.e2e_latency.observe(at - flight.received_at)
        if isinstance(event, Finished):
            self._metrics.finished(event.reason, event.stats)
            flight.trace.finished(event.reason, event.stats)
        else:
            self._metrics.failed(event.error.code)
            if flight.machine.lost_at is not None:
                self._metrics.loss_to_error.observe(at - flight.machine.lost_at)
            flight.trace.failed(event.error, len(flight.machine.emitted))

    # ---- placing

    def _find_place(self, flight: _Flight, find: actions.FindPlace) -> events.Event | None:
        self._leave_attempt(flight)
        flight.find = find
        if find.cause is not None:
            flight.trace.replaying(find.cause, find.attempt, len(flight.machine.emitted))
        # Whoever came first goes first; a replay came before everyone in line.
        found = None if find.cause is None and self._line else self._try_place(flight)
        if found is not None:
            return found
        if find.cause is not None:
            self._wait_for_place(flight, find.wait_s)
            self._replaying[flight] = None
            return None
        parked = not self._decoders()
        self._wait_for_place(
            flight, self.parking.wait_s(flight.request, find.wait_s, parked=parked)
        )
        position = self._line.add(flight)
        self.parking.demand()
        eta = None if parked else self._rate.eta_s(position)
        return events.NoPlace(self._clock(), position, eta, parked=parked)

    def _decoders(self) -> bool:
        links = self._registry.links
        return any(k.role is Role.DECODE and k.awake and not k.draining for k in links)

    def _wait_for_place(self, flight: _Flight, wait_s: float) -> None:
        if flight.place_timer is not None:
            flight.place_timer.cancel()
        flight.wait_s = wait_s
        flight.place_timer = asyncio.get_running_loop().call_later(
            wait_s, self._place_timed_out, flight
        )

    def _set_deadline(self, flight: _Flight, seconds: float) -> None:
        if flight.deadline is not None:
            flight.deadline.cancel()
        flight.deadline = asyncio.get_running_loop().call_later(
            seconds, lambda: self._feed(flight, events.DeadlineReached(self._clock()))
        )

    # ---- a pool at zero

    def _begin_parking(self, flight: _Flight) -> None:
        """Its time to run stops, and it hears what the others have heard."""
        if flight.machine.state is not m.State.PARKED or not self.parking.wakes:
            return
        if flight.deadline is not None:
            flight.deadline.cancel()
        now = self._clock()
        for start in self.parking.under_way(now):
            self._feed(flight, events.StartProgress(now, start))

    def _park(self) -> None:
        """The last decode worker is gone: what waits for a place waits for the next one."""
        if not self.parking.wakes:
            return
        now = self._clock()
        for position, flight in enumerate(self._line, 1):
            self._wait_for_place(flight, self.parking.wait_s(flight.request, 0.0, parked=True))
            self._feed(flight, events.NoPlace(now, position, None, parked=True))
            self._begin_parking(flight)
        self.parking.demand()

    def _unpark(self) -> None:
        """A decode worker is there: time to run begins for all that waited for one."""
        now = self._clock()
        for flight in self._line:
            find, machine = flight.find, flight.machine
            if machine.state is not m.State.PARKED or find is None:
                continue
            self._feed(flight, events.PoolAwake(now))
            self._set_deadline(flight, machine.deadline_at - now)
            wait_s = self.parking.wait_s(flight.request, find.wait_s, parked=False)
            self._wait_for_place(flight, wait_s)

    def _tell_parked(self, event: events.StartProgress) -> None:
        for flight in self._line:
            self._feed(flight, event)

    def _try_place(self, flight: _Flight) -> events.PlaceFound | None:
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
        self._by_sequence[flight.sequence_id] = flight
        for link in flight.links:
            link.dispatch(flight.sequence_id, tokens)
        return events.PlaceFound(self._clock(), flight.sequence_id, path)

    def _new_sequence_id(self) -> int:
        """Unguessable, and never one that is in use."""
        while True:
            sequence_id = secrets.randbits(64)
            if sequence_id and sequence_id not in self._by_sequence:
                return sequence_id

    def _leave_attempt(self, flight: _Flight) -> None:
        """From here on messages about the attempt find nobody."""
        self._by_sequence.pop(flight.sequence_id, None)
        for link in flight.links:
            link.leave(flight.sequence_id)
        flight.sequence_id = 0
        flight.links = ()

    def _stop_waiting(self, flight: _Flight) -> None:
        self._line.discard(flight)
        self._replaying.pop(flight, None)
        if flight.place_timer is not None:
            flight.place_timer.cancel()
            flight.place_timer = None

    def _place_timed_out(self, flight: _Flight) -> None:
        if flight.find is None:
            return
        now, attempt = self._clock(), flight.find.attempt
        waking = self.parking.wakes and flight.machine.state is m.State.PARKED
        retry_after = (
            self.parking.retry_after_s(now) if waking else self._rate.retry_after_s(len(self._line))
        )
        self._feed(flight, events.PlaceTimedOut(now, attempt, retry_after, flight.wait_s, waking))

    def _schedule_pump(self) -> None:
        """Room may have come free: look at the line once this tick's work is done."""
        if self._pump_scheduled or not (self._line or self._replaying):
            return
        self._pump_scheduled = True
        asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_scheduled = False
        for flight in tuple(self._replaying):
            self._pump_one(flight)
        for flight in self._line:
            if not self._pump_one(flight) and flight.request.force_path is None:
                return  # first come, first served

    def _pump_one(self, flight: _Flight) -> bool:
        """Returns False where it has to go on waiting."""
        if flight.find is None:
            return True  # ended meanwhile
        found = self._try_place(flight)
        if found is None:
            return False
        self._feed(flight, found)
        return True


def _view(link: WorkerLink) -> WorkerView:
    load = link.load
    return WorkerView(
        name=link.name,
        role=link.role.value,
        device=link.device,
        running=load.running,
        waiting=load.waiting,
        total_blocks=load.total_blocks,
        free_blocks=load.free_blocks,
        cached_blocks=load.cached_blocks,
        draining=link.draining or link.slumber.rest is Rest.RETIRING,
        asleep=link.slumber.rest in {Rest.FALLING, Rest.ASLEEP, Rest.WAKING},
    )
