"""Requests that find no worker but one that sleeps."""

import asyncio

import pytest
from fake_worker import answer

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_router.fleet.slumber import Rest
from kvrelay_router.requests.parking import WAKE
from kvrelay_router.requests.placement import Role
from kvrelay_router.requests.types import ColdStart, Queued, Started
from kvrelay_router.scaling.config import PoolConfig, ScalerConfig
from kvrelay_router.scaling.loop import Scaling

from .conftest import collect, tokens_of

PROMPT = tuple(range(1, 41))
POOL = PoolConfig(0, 1, idle_s=1e6, sleep_s=1e6)


class Provider:
    """Starts nothing, and writes down what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    async def scale(self, pool: str, replicas: int) -> None:
        self.told.append((pool, replicas))


@pytest.fixture
async def rig(make_rig):
    config = ScalerConfig(prefill=PoolConfig(0, 0), decode=POOL)
    made = await make_rig(scaling=Scaling(config, Provider(), dict.fromkeys(Role, 0)))
    made.told = made.core._scaler._provider.told
    return made


async def test_a_request_wakes_the_worker_that_sleeps_and_hears_of_it(rig) -> None:
    worker = await rig.join("d0", "decode", asleep=True)
    events = await collect(rig.submit())
    assert tokens_of(events) == answer(PROMPT, 8)
    starts = [event for event in events if isinstance(event, ColdStart)]
    assert starts == [ColdStart("decode", WAKE, 0, 0, None)]
    kinds = [type(event) for event in events]
    assert kinds.index(Queued) < kinds.index(ColdStart) < kinds.index(Started)
    assert worker.kinds()[0] == "wake"
    assert rig.told == []
    assert rig.metric("queue_to_wake_seconds_count") == 1
    (queue,) = [span for span in rig.spans.get_finished_spans() if span.name == "queue"]
    assert queue.attributes == {"kvrelay.cold_start": "wake"}


async def test_however_many_wait_one_is_woken_and_once(rig) -> None:
    worker = await rig.join("d0", "decode", asleep=True)
    streams = [rig.submit(request_id=f"r{n}") for n in range(50)]
    for events in await asyncio.gather(*map(collect, streams)):
        assert tokens_of(events) == answer(PROMPT, 8)
    assert worker.kinds().count("wake") == 1
    assert rig.told == []


async def test_who_comes_while_it_wakes_up_hears_what_the_others_heard(rig) -> None:
    worker = await rig.join("d0", "decode", asleep=True, obey_rest=False)
    first = rig.submit(request_id="first")
    await worker.until(lambda: worker.kinds() == ["wake"])
    second = rig.submit(request_id="second")
    worker._rest(False, 1)
    for events in await asyncio.gather(collect(first), collect(second)):
        assert [e.phase for e in events if isinstance(e, ColdStart)] == [WAKE]
        assert tokens_of(events) == answer(PROMPT, 8)


async def test_one_that_dies_while_it_wakes_up_costs_the_request_nothing_but_time(rig) -> None:
    worker = await rig.join("d0", "decode", asleep=True, obey_rest=False)
    stream = rig.submit()
    await worker.until(lambda: worker.kinds() == ["wake"])
    worker.die()
    await worker.until(lambda: not rig.core.registry.links)
    await rig.join("d0", "decode")
    assert tokens_of(await collect(stream)) == answer(PROMPT, 8)


async def test_a_worker_on_its_way_to_sleep_is_given_nothing(rig) -> None:
    worker = await rig.join("d0", "decode", asleep=True)
    first = await collect(rig.submit())
    (link,) = rig.core.registry.links
    rig.core.registry.sleep(link)
    assert link.slumber.rest is Rest.FALLING
    assert tokens_of(await collect(rig.submit())) == tokens_of(first)
    # It was told to sleep, then to wake up, and only then to work.
    assert worker.kinds() == ["wake", "submit_decode", "sleep", "wake", "submit_decode"]


async def test_health_and_metrics_say_that_it_sleeps(rig) -> None:
    await rig.join("d0", "decode", asleep=True)
    health = rig.core.service.health()
    assert (health.ready, health.phase, health.max_model_len) == (True, "asleep", 4096)
    assert [(w.name, w.asleep) for w in health.workers] == [("d0", True)]
    assert rig.metric("workers", role="decode", state="asleep") == 1
    assert rig.metric("workers", role="decode", state="ready") == 0
    await collect(rig.submit())
    assert rig.core.service.health().phase == "ready"
    assert rig.metric("workers", role="decode", state="asleep") == 0
    assert rig.metric("workers", role="decode", state="ready") == 1


async def test_a_router_that_starts_no_workers_wakes_whoever_joins_asleep(make_rig) -> None:
    rig = await make_rig()
    worker = await rig.join("d0", "decode", asleep=True)
    assert tokens_of(await collect(rig.submit())) == answer(PROMPT, 8)
    assert worker.messages("wake") == [pb.Wake(order=1)]
