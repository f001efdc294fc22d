"""Requests that wait for a pool at zero: what they hear, how long they wait, when their own time begins."""

import asyncio

import grpc.aio
import pytest
from fake_worker import answer

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc
from kvrelay_protocol.errors import DeadlineExceeded, NoCapacity, WaitOver
from kvrelay_protocol.versions import JOIN_VERSION
from kvrelay_router.fleet.registry import StartingWorker
from kvrelay_router.requests.parking import Parking
from kvrelay_router.requests.placement import MAX_WAITING, Role
from kvrelay_router.requests.types import ColdStart, Failed, Finished, Queued

from .conftest import CONFIG, a_request, collect, tokens_of

PROMPT = tuple(range(1, 41))


class Waker:
    """Whoever starts workers: counts how often it was asked."""

    def __init__(self, rig) -> None:
        self.asked = 0
        rig.core.service.parking.on_demand = self._ask

    def _ask(self) -> None:
        self.asked += 1


async def next_event(stream):
    return await anext(aiter(stream))


def starting(phase: str, done: int = 0, total: int = 0) -> pb.WorkerMessage:
    return pb.WorkerMessage(
        starting=pb.Starting(
            protocol_version=JOIN_VERSION,
            worker_name="d0",
            role=pb.ROLE_DECODE,
            model="demo",
            phase=phase,
            done=done,
            total=total,
        )
    )


async def test_a_parked_request_outlives_its_deadline_and_runs_when_a_worker_is_there(
    make_rig,
) -> None:
    rig = await make_rig(queue_timeout_s=0.1)
    waker = Waker(rig)
    stream = rig.submit(deadline_s=0.2)
    assert await next_event(stream) == Queued(1, None)
    # Longer than it may run, and longer than it may queue.
    await asyncio.sleep(0.5)
    assert waker.asked == 1
    flight = rig.core.service._placing.waiting[0]
    before = flight.machine.deadline_at
    await rig.join("d0", "decode")
    events = await collect(stream)
    assert tokens_of(events) == answer(PROMPT, 8)
    assert flight.machine.deadline_at - before >= 0.5


async def test_its_own_time_runs_out_where_the_worker_that_came_does_nothing(make_rig) -> None:
    rig = await make_rig()
    Waker(rig)
    stream = rig.submit(deadline_s=0.3)
    worker = await rig.join("d0", "decode", step_s=60.0)
    events = await collect(stream)
    (end,) = [event for event in events if isinstance(event, Failed)]
    assert isinstance(end.error, DeadlineExceeded)
    await worker.until(lambda: not worker.open)


async def test_without_anybody_who_starts_workers_it_waits_no_longer_than_in_the_queue(
    make_rig,
) -> None:
    rig = await make_rig(queue_timeout_s=0.1)
    events = await collect(rig.submit())
    (end,) = [event for event in events if isinstance(event, Failed)]
    assert type(end.error) is NoCapacity
    assert "asleep" not in end.error.message


async def test_the_wait_for_a_wake_up_is_bounded(make_rig) -> None:
    rig = await make_rig(wake_timeout_s=0.1)
    Waker(rig)
    (end,) = [e for e in await collect(rig.submit()) if isinstance(e, Failed)]
    assert type(end.error) is NoCapacity
    assert "0.1 s; the model sleeps, and wakes up now" in end.error.message


async def test_who_does_not_want_to_wait_is_told_when_to_come_back_and_wakes_the_pool(
    make_rig,
) -> None:
    rig = await make_rig()
    waker = Waker(rig)
    (end,) = [e for e in await collect(rig.submit(wait_s=0.0)) if isinstance(e, Failed)]
    assert isinstance(end.error, WaitOver)
    assert end.error.retry_after_s >= 1
    assert waker.asked == 1


async def test_a_callers_wait_holds_in_the_queue_too(make_rig) -> None:
    rig = await make_rig(queue_timeout_s=60.0)
    Waker(rig)
    full = await rig.join("d0", "decode", step_s=60.0)
    full.report(waiting=MAX_WAITING, free_blocks=0)
    await full.until(lambda: rig.core.registry.links[0].load.waiting == MAX_WAITING)
    (end,) = [e for e in await collect(rig.submit(wait_s=0.0)) if isinstance(e, Failed)]
    assert isinstance(end.error, WaitOver)
    assert "asleep" not in end.error.message


async def test_progress_of_a_start_reaches_everybody_parked_also_later_ones(make_rig) -> None:
    rig = await make_rig()
    Waker(rig)
    service = rig.core.service
    early = rig.submit(request_id="early")
    assert await next_event(early) == Queued(1, None)
    service.start_requested(Role.DECODE, wake=False)
    assert await next_event(early) == ColdStart("decode", "requested", 0, 0, None)
    late = rig.submit(request_id="late")
    assert await next_event(late) == Queued(2, None)
    assert await next_event(late) == ColdStart("decode", "requested", 0, 0, None)

    told = asyncio.Queue()

    async def say():
        while (message := await told.get()) is not None:
            yield message

    async with grpc.aio.insecure_channel(f"127.0.0.1:{rig.core.join_port}") as channel:
        call = fleet_pb2_grpc.FleetStub(channel).Join(say())
        told.put_nowait(starting("load_weights", 3, 10))
        for stream in (early, late):
            event = await next_event(stream)
            assert (event.phase, event.done, event.total) == ("load_weights", 3, 10)
        assert service.health().starting == ("d0",)
        told.put_nowait(None)
        await call.read()
    await rig.join("d0", "decode")
    for stream in (early, late):
        events = await collect(stream)
        assert isinstance(events[-1], Finished)
        assert not [event for event in events if isinstance(event, ColdStart)]


async def test_what_waits_in_line_parks_when_the_last_decode_worker_goes(make_rig) -> None:
    rig = await make_rig(queue_timeout_s=60.0)
    waker = Waker(rig)
    # Blocks for one request alone: the others queue.
    dying = await rig.join("d0", "decode", step_s=60.0)
    dying.report(total_blocks=4, free_blocks=4)
    await dying.until(lambda: rig.core.registry.links[0].load.total_blocks == 4)
    streams = [rig.submit(request_id=f"r{n}") for n in range(40)]
    await asyncio.sleep(0)
    service = rig.core.service
    queued = len(service._placing.waiting)
    assert queued
    before = waker.asked
    dying.die()
    await dying.until(lambda: not rig.core.registry.links)
    parked = list(service._placing.parked)
    assert len(parked) == queued
    assert waker.asked > before
    assert all(flight.deadline.cancelled() for flight in parked)
    await rig.join("d1", "decode")
    ends = [events[-1] for events in await asyncio.gather(*map(collect, streams))]
    assert sum(isinstance(end, Finished) for end in ends) == 40


async def test_an_asleep_router_is_healthy_and_knows_its_context(make_rig) -> None:
    rig = await make_rig()
    assert not rig.core.service.health().ready
    Waker(rig)
    assert (rig.core.service.health().ready, rig.core.service.health().phase) == (True, "asleep")
    worker = await rig.join("d0", "decode")
    assert rig.core.service.health().phase == "ready"
    assert rig.core.service.context_limit() == 4096
    worker.die()
    await worker.until(lambda: not rig.core.registry.links)
    assert rig.core.service.context_limit() == 4096


async def test_demand_counts_what_waits_what_came_and_how_long_nothing_did(make_rig) -> None:
    rig = await make_rig()
    Waker(rig)
    service = rig.core.service
    stream = rig.submit()
    now = service._clock()
    demand = service.demand(now)
    assert (demand.waiting, demand.waiting_tokens, demand.arrived) == (1, 40, 1)
    assert (demand.waiting_blocks, demand.idle_s, demand.prompts_idle_s) == (3, 0.0, 0.0)
    assert service.demand(now).arrived == 0
    stream.cancel("test")
    await collect(stream)
    demand = service.demand(now + 7)
    assert (demand.waiting, demand.waiting_tokens) == (0, 0)
    assert demand.idle_s == pytest.approx(7)


async def test_a_worker_that_came_for_nobody_has_been_idle_only_since_then(make_rig) -> None:
    rig = await make_rig()
    Waker(rig)
    service = rig.core.service
    await collect(rig.submit(wait_s=0.0))
    service._busy_at -= 60.0
    await rig.join("d0", "decode")
    assert service.demand(service._clock()).idle_s < 60.0


def worker(phase: str, elapsed_s: float, done: int = 0) -> StartingWorker:
    return StartingWorker("d0", Role.DECODE, phase, done, 100, elapsed_s)


def test_the_eta_is_what_the_last_start_took() -> None:
    parking = Parking(CONFIG)
    assert parking.requested(Role.DECODE, 100.0).eta_s is None
    parking.joined(Role.DECODE, 104.0)
    assert parking.requested(Role.DECODE, 200.0).eta_s == 4.0
    assert parking.progress(worker("import", 0.5), 201.0).eta_s == 3.0
    assert parking.under_way(202.5) == [ColdStart("decode", "import", 0, 100, 1.5)]
    assert parking.retry_after_s(200.5) == 4.0
    assert parking.progress(worker("warm_up", 3.0), 209.0).eta_s == 0.0
    assert parking.retry_after_s(209.0) == 1.0
    parking.joined(Role.DECODE, 210.0)
    assert parking.under_way(211.0) == []


def test_one_phase_is_told_a_few_times_a_second_and_a_new_one_at_once() -> None:
    parking = Parking(CONFIG)
    assert parking.progress(worker("load_weights", 0.0, 1), 0.0) is not None
    assert parking.progress(worker("load_weights", 0.0, 2), 0.1) is None
    assert parking.progress(worker("load_weights", 0.0, 3), 0.3).done == 3
    assert parking.progress(worker("warm_up", 0.0), 0.31).phase == "warm_up"


@pytest.mark.parametrize(
    ("wakes", "parked", "wait_s", "expected"),
    [
        (True, True, None, CONFIG.wake_timeout_s),
        (True, True, 7.0, 7.0),
        (True, True, 10**6, CONFIG.wake_timeout_s),
        (True, False, None, 5.0),
        (False, True, None, 5.0),
        (False, True, 2.0, 2.0),
    ],
)
def test_how_long_a_request_waits(wakes, parked, wait_s, expected) -> None:
    parking = Parking(CONFIG)
    if wakes:
        parking.on_demand = lambda: None
    assert parking.wait_s(a_request(wait_s=wait_s), 5.0, parked=parked) == expected
