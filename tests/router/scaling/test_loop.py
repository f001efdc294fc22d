"""When the loop decides, what it tells the provider, and what it does when that fails."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.versions import JOIN_VERSION
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.requests.demand import FleetDemand
from kvrelay_router.requests.placement import Role
from kvrelay_router.scaling import loop as loop_module
from kvrelay_router.scaling.config import PoolConfig, ScalerConfig
from kvrelay_router.scaling.loop import ScalerLoop, Scaling

POOL = PoolConfig(0, 4, idle_s=10.0, stabilisation_s=5.0, cooldown_s=0.0, start_timeout_s=100.0)
WAITING = FleetDemand(waiting=1, arrived=1, waiting_tokens=40, waiting_blocks=3)
IDLE = FleetDemand(idle_s=1000.0, prompts_idle_s=1000.0)
LAYOUT = pb.KvLayout(block_size=16, num_layers=2, num_kv_heads=2, head_dim=8, protocol_version=1)


class DownProvider(Exception):
    """It can't be reached."""


@dataclass
class Recorder:
    """A provider and a listener that write down what they hear."""

    told: list[tuple[str, int]] = field(default_factory=list)
    failing: bool = False
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    """While it is not set, the provider takes its time."""
    requested: list[tuple[Role, bool]] = field(default_factory=list)
    """Pools, and whether somebody was woken."""
    scales: list[tuple[Role, int, str]] = field(default_factory=list)
    failures: list[Role] = field(default_factory=list)

    async def scale(self, pool: str, replicas: int) -> None:
        self.told.append((pool, replicas))
        if not self.answers.is_set():
            await self.answers.wait()
        if self.failing:
            raise DownProvider

    def start_requested(self, pool: Role, *, wake: bool) -> None:
        self.requested.append((pool, wake))

    def scaled(self, pool: Role, replicas: int, reason: str) -> None:
        self.scales.append((pool, replicas, reason))

    def scaling_failed(self, pool: Role) -> None:
        self.failures.append(pool)


class Bench:
    """A loop with a clock, a demand and workers that the test sets."""

    def __init__(self, prefill: PoolConfig, decode: PoolConfig, running: dict[Role, int]) -> None:
        self.now = 0.0
        self.demand = FleetDemand()
        self.decisions = 0
        self.heard = Recorder()
        self.heard.answers.set()
        self.registry = WorkerRegistry(RouterConfig(Path("unused"), "demo"), clock=lambda: self.now)
        scaling = Scaling(ScalerConfig(prefill=prefill, decode=decode), self.heard, running)
        self.loop = ScalerLoop(
            scaling, self.registry, self._demand, self.heard, clock=lambda: self.now
        )

    def _demand(self, now: float) -> FleetDemand:
        assert now == self.now
        self.decisions += 1
        return self.demand

    def join(self, name: str, **load: float) -> None:
        role = pb.ROLE_PREFILL if name.startswith("prefill") else pb.ROLE_DECODE
        self.registry.join(
            pb.Hello(
                protocol_version=JOIN_VERSION,
                worker_name=name,
                role=role,
                model="demo",
                kv_layout=LAYOUT,
                load=pb.Load(total_blocks=100, free_blocks=100, **load),
            )
        )

    def lose(self, name: str) -> None:
        link = self.registry.get(name)
        assert link is not None
        self.registry.lose(link, "its stream ended")

    async def decide(self) -> None:
        """Nudge, and wait for the decision; a provider that answers at once was told by then."""
        before = self.decisions
        self.loop.nudge()
        await until(lambda: self.decisions > before)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def running(
    *,
    prefill: PoolConfig = POOL,
    decode: PoolConfig = POOL,
    running: tuple[int, int] = (0, 0),
    joined: tuple[str, ...] = (),
) -> AsyncIterator[Bench]:
    """A loop after its first decision. `running` are prefill and decode workers."""
    bench = Bench(prefill, decode, dict(zip((Role.PREFILL, Role.DECODE), running, strict=True)))
    for name in joined:
        bench.join(name)
    task = asyncio.create_task(bench.loop.run())
    try:
        await until(lambda: bench.decisions > 0)
        yield bench
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def no_ticks(monkeypatch):
    """Nothing is decided but at the start and when somebody nudges."""
    monkeypatch.setattr(loop_module, "TICK_S", 1e6)


async def test_nothing_is_asked_of_the_provider_while_nobody_needs_anything():
    async with running() as bench:
        await bench.decide()
        assert bench.heard.told == []
        assert bench.heard.scales == []


async def test_a_nudge_decides_at_once():
    async with running() as bench:
        bench.demand = WAITING
        await bench.decide()
        assert bench.heard.told == [("decode", 1)]
        assert bench.heard.requested == [(Role.DECODE, False)]
        assert bench.heard.scales == [(Role.DECODE, 1, "wake")]
        assert bench.loop.desired == {Role.PREFILL: 0, Role.DECODE: 1}


async def test_without_a_nudge_it_decides_at_the_tick(monkeypatch):
    monkeypatch.setattr(loop_module, "TICK_S", 0.001)
    async with running() as bench:
        bench.demand = WAITING
        await until(lambda: bench.heard.told == [("decode", 1)])


async def test_many_nudges_activate_once_while_the_start_is_pending():
    async with running() as bench:
        bench.demand = replace(WAITING, waiting=50, arrived=50)
        for _ in range(20):
            bench.now += 1.0
            await bench.decide()
        assert bench.heard.told == [("decode", 1)]
        assert bench.heard.requested == [(Role.DECODE, False)]


async def test_nudges_while_the_provider_is_being_asked_activate_once():
    async with running() as bench:
        bench.heard.answers.clear()
        bench.demand = WAITING
        await bench.decide()
        for _ in range(20):
            bench.loop.nudge()
            await asyncio.sleep(0)
        before = bench.decisions
        bench.heard.answers.set()
        await until(lambda: bench.decisions > before)
        assert bench.heard.told == [("decode", 1)]
        await bench.decide()
        assert bench.heard.told == [("decode", 1)]


async def test_decode_is_told_before_prefill():
    least = replace(POOL, min=1)
    async with running(prefill=least, decode=least) as bench:
        await until(lambda: len(bench.heard.told) == 2)
        assert bench.heard.told == [("decode", 1), ("prefill", 1)]
        assert bench.heard.requested == [(Role.DECODE, False), (Role.PREFILL, False)]


async def test_more_is_asked_for_where_workers_are_up_and_full():
    async with running(running=(0, 1), joined=("decode-0",)) as bench:
        bench.demand = FleetDemand(waiting=130, waiting_blocks=1)
        for bench.now in range(1, 1000):  # a moment's peak is no trend
            await bench.decide()
            if len(bench.heard.told) == 2:
                break
        assert bench.heard.told == [("decode", 2), ("decode", 3)]
        assert bench.heard.requested == []  # the pool was not at zero


async def test_an_idle_fleet_goes_to_zero_after_its_time_and_wakes_again():
    async with running(prefill=replace(POOL, max=0), running=(0, 1), joined=("decode-0",)) as bench:
        bench.registry.get("decode-0").load.prefill_tokens_per_second = 1000.0
        bench.demand = IDLE
        for bench.now in (
            1.0,
            9.0,
        ):  # it watches for as long itself, before it believes in idleness
            await bench.decide()
            assert bench.heard.told == []
        bench.now = 11.0
        await bench.decide()
        assert bench.heard.told == [("decode", 0)]
        assert bench.heard.scales == [(Role.DECODE, 0, "idle")]
        bench.lose("decode-0")
        await bench.decide()
        bench.demand = WAITING
        await bench.decide()
        assert bench.heard.told == [("decode", 0), ("decode", 1)]


async def test_a_pool_that_is_used_does_not_go_to_zero():
    async with running(running=(0, 1), joined=("decode-0",)) as bench:
        bench.registry.get("decode-0").load.running = 1
        for bench.now in (20.0, 200.0, 2000.0):
            await bench.decide()
        assert bench.heard.told == []


@pytest.mark.parametrize("joined", [(), ("decode-0",), ("prefill-0", "decode-0")])
async def test_what_runs_already_is_not_started_again(joined):
    async with running(running=(1, 1), joined=joined) as bench:
        bench.demand = WAITING
        for bench.now in (0.0, 1.0, 2.0):
            await bench.decide()
        assert bench.heard.told == []
        assert bench.heard.requested == []


async def test_a_provider_that_fails_is_asked_again_after_a_pause(monkeypatch, caplog):
    monkeypatch.setattr(loop_module, "RETRY_S", 0.001)
    async with running() as bench:
        bench.heard.failing = True
        bench.demand = WAITING
        bench.loop.nudge()
        await until(lambda: len(bench.heard.failures) >= 3)
        assert set(bench.heard.failures) == {Role.DECODE}
        assert bench.loop.desired[Role.DECODE] == 0
        assert bench.heard.scales == []
        bench.heard.failing = False
        await until(lambda: bool(bench.heard.scales))
        assert bench.heard.scales == [(Role.DECODE, 1, "wake")]
        asked = len(bench.heard.told)
        await bench.decide()
        assert len(bench.heard.told) == asked
    assert set(bench.heard.told) == {("decode", 1)}
    assert all("decode could not be scaled from 0 to 1" in r.getMessage() for r in caplog.records)


async def test_a_provider_that_fails_is_not_asked_for_every_request(monkeypatch):
    monkeypatch.setattr(loop_module, "RETRY_S", 1e6)
    async with running() as bench:
        bench.heard.failing = True
        bench.demand = WAITING
        await bench.decide()
        await until(lambda: bool(bench.heard.failures))
        for _ in range(100):
            bench.loop.nudge()
            await asyncio.sleep(0)
        assert bench.heard.told == [("decode", 1)]


async def test_one_pool_that_fails_does_not_keep_the_other_from_being_told(monkeypatch):
    monkeypatch.setattr(loop_module, "RETRY_S", 1e6)
    least = replace(POOL, min=1)
    bench = Bench(least, least, {Role.PREFILL: 0, Role.DECODE: 0})
    bench.heard.failing = True
    task = asyncio.create_task(bench.loop.run())
    await until(lambda: len(bench.heard.failures) == 2)
    assert bench.heard.told == [("decode", 1), ("prefill", 1)]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_start_that_takes_too_long_is_cancelled_where_another_one_serves():
    async with running(running=(0, 2), joined=("decode-0",)) as bench:
        bench.demand = WAITING
        bench.now = 101.0
        await bench.decide()
        assert bench.heard.told == [("decode", 1)]


async def test_a_worker_that_dies_after_a_long_life_has_all_the_time_of_a_start_to_come_back():
    async with running(running=(0, 2), joined=("decode-0", "decode-1")) as bench:
        busy = FleetDemand(waiting=70, waiting_blocks=1)
        bench.demand = busy
        bench.now = 5000.0
        await bench.decide()
        bench.lose("decode-1")
        for bench.now in (5000.1, 5060.0, 5099.0):
            await bench.decide()
            assert bench.heard.told == []
        bench.now = 5101.0
        await bench.decide()
        assert bench.heard.told == [("decode", 1)]


async def test_what_is_found_is_told_until_the_provider_takes_it(monkeypatch):
    monkeypatch.setattr(loop_module, "RETRY_S", 0.001)
    monkeypatch.setattr(loop_module, "ADOPT_S", 0.0)
    bench = Bench(replace(POOL, min=1), POOL, {})
    bench.heard.failing = True
    bench.join("decode-0")
    task = asyncio.create_task(bench.loop.run())
    try:
        await until(lambda: len(bench.heard.failures) > 2)
        bench.heard.failing = False
        await until(lambda: bench.decisions > 0)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert {(role.value, n) for role, n, why in bench.heard.scales if why == "found"} == {
        ("prefill", 1),
        ("decode", 1),
    }
