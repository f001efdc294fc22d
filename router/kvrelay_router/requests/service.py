"""The asyncio shell around the request machines: feeds them events and carries out their actions.

Everything runs on one event loop and nothing in here waits, apart from `drain`. A worker's message is
handled to the end, for every sequence in it, before the loop goes on: a lost worker's requests are
re-placed in the tick that noticed.
"""

import asyncio
import logging
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
from kvrelay_router.requests.demand import FleetDemand
from kvrelay_router.requests.flight import Flight
from kvrelay_router.requests.machine import RequestMachine
from kvrelay_router.requests.parking import Parking
from kvrelay_router.requests.placement import Role, blocks_needed
from kvrelay_router.requests.placing import Placing
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
        self._flights: set[Flight] = set()
        self._placing = Placing(config, registry, clock=self._clock, feed=self._feed)
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
        self._generated = 0
        """Tokens of the step message in hand, added to the metric once per message."""
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.running.set_function(lambda: len(self._placing.running))
        metrics.waiting.set_function(lambda: len(self._placing.waiting))

    @property
    def parking(self) -> Parking:
        """What requests are told while a pool wakes, and who is asked to wake it."""
        return self._placing.parking

    # ---- for the edge

    def submit(self, request: ValidRequest) -> RequestStream:
        """Admit a request; see `RequestService.submit`."""
        try:
            if self._draining:
                raise Draining("the server is shutting down and takes no new requests")
            self._placing.check_room()
        except KvrelayError as error:
            self._metrics.rejections.labels(error.code).inc()
            raise
        now = self._clock()
        machine = RequestMachine(
            request,
            received_at=now,
            max_replays=self._config.max_replays,
            queue_timeout_s=self._config.queue_timeout_s,
            replay_wait_s=self._config.replay_wait_s,
        )
        flight = Flight(request, machine, RequestTrace(self._telemetry, request), received_at=now)
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
        self._placing.set_deadline(flight, request.deadline_s)
        self._feed(flight, events.Admitted(now))
        return flight.stream

    def health(self) -> Health:
        views = tuple(_view(link) for link in self._registry.links)
        awake = self._placing.awake
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
            # It sleeps by the order of a router that scales, and this one does not.
            self._registry.wake(link)

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
            self._placing.unpark()
        self._placing.look_again()

    def worker_starting(self, starting: StartingWorker) -> None:
        now = self._clock()
        if (start := self.parking.progress(starting, now)) is not None:
            self._placing.tell_parked(events.StartProgress(now, start))

    # ---- for the scaler

    def demand(self, now: float) -> FleetDemand:
        """What is in hand; the requests that came since the last call are counted once."""
        waiting = self._placing.waiting
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
            transferring=sum(f.machine.awaits_kv for f in self._placing.running.values()),
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
        received = [flight.received_at for flight in self._placing.parked]
        if received:
            self._metrics.queue_to_wake.observe(now - min(received))
        start = self.parking.requested(pool, now, wake=wake)
        self._placing.tell_parked(events.StartProgress(now, start))

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
        for flight in tuple(self._placing.running.values()):
            if link in flight.links:
                self._feed(flight, event)
        if link.role is Role.DECODE and not self._placing.awake:
            self._placing.park()
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
                self._placing.look_again()
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
            machine = self._placing.running[sequence_id].machine
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
            flight = self._placing.running.get(sequence_id)
            if flight is None or not flight.machine.holds(link.name):
                continue
            self._metrics.unknown_sequences.inc()
            error = WorkerLost(f"worker {link.name} does not have the request any more")
            self._feed(flight, events.SequenceFailed(now, sequence_id, link.name, error))

    def _step(self, now: float, worker: str, step: pb.StepOutput) -> None:
        """The tokens of one engine step, all sequences. Most of them need nothing but to be passed on."""
        running = self._placing.running
        gaps: dict[float, int] = {}  # sequences of a batch have the same
        passed_on = 0
        for run in step.runs:
            sequence_id = run.sequence_id
            flight = running.get(sequence_id)
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
        flight = self._placing.running.get(event.sequence_id)
        if flight is None:
            return
        if isinstance(event, events.LeaseGranted | events.SequenceStarted) and link.pending.grant(
            event.sequence_id,
        ):
            self._placing.look_again()
        if isinstance(event, events.KvReceived):
            self._metrics.kv_received(event.bytes, event.seconds, event.transport)
        self._feed(flight, event)

    # ---- the shell

    def _feed(self, flight: Flight, event: events.Event) -> None:
        """Hand an event to the machine and carry out what it answers."""
        try:
            for action in flight.machine.handle(event):
                answer = self._carry_out(flight, action, event.at)
                if answer is not None:  # to `FindPlace`, which is always the last action
                    self._feed(flight, answer)
                    if isinstance(answer, events.NoPlace):
                        self._placing.begin_parking(flight)
        except Exception:
            logger.exception("defect", extra={"request_id": flight.request.request_id})
            if not isinstance(event, events.Broken):
                what = f"internal error, logged under request id {flight.request.request_id}"
                self._feed(flight, events.Broken(self._clock(), what))

    def _carry_out(self, flight: Flight, action: actions.Action, at: float) -> events.Event | None:
        match action:
            case actions.Emit(event):
                self._emit(flight, event, at)
                return None
            case actions.FindPlace():
                return self._placing.find(flight, action)
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

    def _sequence(self, flight: Flight, attempt: actions.Attempt) -> pb.Sequence:
        """Made once for both workers of an attempt."""
        made = flight.sequence
        if made is None or made.sequence_id != attempt.sequence_id:
            made = sequence_of(attempt, flight.request, flight.traceparent)
            flight.sequence = made
        return made

    def _emit(self, flight: Flight, event: RequestEvent, at: float) -> None:
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

    def _ended(self, flight: Flight, event: Finished | Failed, at: float) -> None:
        self._placing.ended(flight, at)
        self._flights.discard(flight)
        if not self._flights:
            self._idle.set()
        self._metrics.e2e_latency.observe(at - flight.received_at)
        if isinstance(event, Finished):
            self._metrics.finished(event.reason, event.stats)
            flight.trace.finished(event.reason, event.stats)
        else:
            self._metrics.failed(event.error.code)
            if flight.machine.lost_at is not None:
                self._metrics.loss_to_error.observe(at - flight.machine.lost_at)
            flight.trace.failed(event.error, len(flight.machine.emitted))


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
