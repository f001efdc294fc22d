"""The rung between serving and zero: who is kept asleep, for how long, and what the provider hears of it."""

from dataclasses import dataclass, field, replace

import pytest
from fleets import CONFIG, POOL, decode_load, fleet, pool, prefill_load

from kvrelay_router.fleet.slumber import Rest
from kvrelay_router.requests.demand import FleetDemand
from kvrelay_router.requests.placement import Role
from kvrelay_router.scaling import FleetState, Memory, PoolConfig, PoolState, ScalerConfig, decide
from kvrelay_router.scaling import loop as loop_module
from kvrelay_router.scaling.state import ShapeMemory

from .test_loop import IDLE, WAITING, running, until

SLEEPY = replace(POOL, sleep_s=600.0)
SLEEPING = replace(CONFIG, prefill=SLEEPY, decode=SLEEPY)


@dataclass
class Decode:
    """A decode pool that obeys at once, decided on second by second."""

    config: ScalerConfig = SLEEPING
    ready: int = 0
    asleep: int = 0
    desired: int = 0
    kept: int = 0
    now: float = 0.0
    memory: Memory = field(default_factory=Memory)
    load: dict = field(default_factory=dict)

    def state(self) -> FleetState:
        decode = PoolState(
            ready=self.ready, asleep=self.asleep, desired=self.desired, kept=self.kept, start_s=10.0
        )
        idle = {"idle_s": 1e6} if not self.load else {}
        known = {
            "decode_load": decode_load(self.ready, **idle),
            "prefill_load": prefill_load(idle_s=1e6),
        }
        return replace(fleet(), decode=decode, **known | self.load)

    def decide(self, seconds: float = 1.0):
        self.now += seconds
        decision = decide(self.state(), self.now, self.config, self.memory)
        self.memory, targets = decision.memory, decision.targets
        self.desired, self.kept = targets.decode, targets.decode_asleep
        self.ready, self.asleep = targets.decode, targets.decode_asleep
        return targets.decode, targets.decode_asleep

    def until(self, wanted, limit_s=10_000):
        began = self.now
        while self.decide() != wanted:
            assert self.now - began < limit_s
        return self.now - began


def test_a_pool_that_goes_to_zero_sleeps_first_and_ends_after_its_time():
    decode = Decode(ready=2, desired=2)
    decode.until((1, 1))
    decode.until((0, 2))
    # From the last change on.
    assert decode.until((0, 0)) == 600
    assert decode.decide() == (0, 0)


def test_without_a_time_to_sleep_nobody_is_kept():
    decode = Decode(config=CONFIG, ready=2, desired=2)
    decode.until((0, 0))
    decode = Decode(config=CONFIG, asleep=2, kept=2)
    assert decode.decide() == (0, 0)


def test_demand_wakes_one_and_keeps_the_others():
    decode = Decode(asleep=2, kept=2, load={"parked": 1, "arrived": 1})
    assert decode.decide() == (1, 1)


def test_a_scale_up_takes_those_that_sleep_before_any_process_is_started():
    streams = {"parked": 0, "decode_load": decode_load(1, streams=150, used_blocks=10)}
    decode = Decode(ready=1, desired=1, asleep=1, kept=1, load=streams)
    decode.until((3, 0))


def test_demand_begins_the_time_anew():
    decode = Decode(ready=1, desired=1)
    decode.until((0, 1))
    for _ in range(500):
        decode.decide()
    decode.load = {"parked": 1}
    assert decode.decide() == (1, 0)
    decode.load = {}
    decode.until((0, 1))
    assert decode.until((0, 0)) == 600


def test_those_left_asleep_beside_one_that_serves_end_after_their_time():
    busy = {"parked": 0, "decode_load": decode_load(1, streams=1, used_blocks=1)}
    decode = Decode(asleep=2, kept=2, load={"parked": 1})
    assert decode.decide() == (1, 1)
    decode.load = busy
    assert decode.until((1, 0)) == 600


def test_who_dies_asleep_is_not_replaced():
    decode = Decode(asleep=2, kept=2)
    assert decode.decide() == (0, 2)
    decode.asleep = 1
    assert decode.decide() == (0, 1)
    # Its process was started again by whoever watches it, and joins before it is ended.
    decode.ready = 1
    assert decode.decide() == (0, 1)


def test_a_start_that_was_cancelled_and_comes_is_not_kept():
    decode = Decode(ready=1)
    assert decode.decide() == (0, 0)


def test_surplus_sleeps_as_well():
    one = {"parked": 0, "decode_load": decode_load(3, streams=1, used_blocks=1)}
    decode = Decode(ready=3, desired=3, load=one)
    assert decode.until((1, 2)) < 600
    assert decode.until((1, 0)) == 600


def test_those_that_sleep_cost_nothing():
    asleep = Decode(asleep=2, kept=2)
    asleep.decide()
    for _ in range(100):
        asleep.decide()
    assert asleep.memory.hour_spent == 0


def test_both_pools_sleep_each_for_itself():
    config = replace(SLEEPING, prefill=replace(SLEEPY, sleep_s=0.0))
    both = fleet(prefill=1, decode=1, decode_load=decode_load(1, idle_s=1e6),
                 prefill_load=prefill_load(idle_s=1e6))  # fmt: skip
    memory = Memory()
    for now in range(200):
        decision = decide(both, float(now), config, memory)
        memory = decision.memory
        if decision.targets.decode == 0:
            break
    assert decision.targets.decode_asleep == 1
    assert decision.targets.prefill == decision.targets.prefill_asleep == 0


def test_the_time_to_sleep_is_not_negative():
    with pytest.raises(ValueError, match="sleep_s -1 must not be negative"):
        PoolConfig(sleep_s=-1)


def test_a_wake_counts_as_the_start_where_somebody_sleeps():
    # What will be done before more workers have started is not before they have woken up.
    load = prefill_load(uncached_tokens=30_000)
    state = fleet(decode=1, prefill_load=load, decode_load=decode_load(1, streams=1, used_blocks=1))
    woken = replace(state, prefill=pool(0, asleep=1, kept=1, start_s=0.1))
    apart = Memory(shape=ShapeMemory(apart=True))
    slow, quick = (decide(each, 0.0, SLEEPING, apart) for each in (state, woken))
    assert 0 < slow.targets.prefill < quick.targets.prefill


# ---- the loop


KEEPING = replace(
    PoolConfig(0, 4, idle_s=10.0, stabilisation_s=5.0, cooldown_s=0.0, start_timeout_s=100.0),
    sleep_s=50.0,
)


@pytest.fixture(autouse=True)
def no_ticks(monkeypatch):
    """Nothing is decided but at the start and when somebody nudges."""
    monkeypatch.setattr(loop_module, "TICK_S", 1e6)


def answer(bench, name: str, *, asleep: bool) -> None:
    link = bench.registry.get(name)
    link.slumber.rest = Rest.ASLEEP if asleep else Rest.AWAKE


async def idle_until_asleep(bench) -> None:
    bench.registry.get("decode-0").load.prefill_tokens_per_second = 1000.0
    bench.demand = IDLE
    for bench.now in (1.0, 9.0, 11.0):
        await bench.decide()
    assert bench.registry.get("decode-0").slumber.rest is Rest.FALLING
    answer(bench, "decode-0", asleep=True)


def one_decode_worker():
    return running(
        prefill=replace(KEEPING, max=0), decode=KEEPING, running=(0, 1), joined=("decode-0",)
    )


async def test_the_provider_hears_nothing_of_sleep_and_wake():
    async with one_decode_worker() as bench:
        await idle_until_asleep(bench)
        assert bench.heard.scales == [(Role.DECODE, 0, "idle")]
        bench.demand = replace(WAITING, waiting=50, arrived=50)
        for bench.now in (12.0, 12.1, 12.2):  # however many wait: one is woken, once
            await bench.decide()
        assert bench.registry.get("decode-0").slumber.rest is Rest.WAKING
        assert bench.heard.requested == [(Role.DECODE, True)]
        assert bench.heard.scales[1:] == [(Role.DECODE, 1, "wake")]
        answer(bench, "decode-0", asleep=False)
        await bench.decide()
        assert bench.heard.told == []


async def test_who_has_slept_long_enough_is_ended_by_the_provider():
    async with one_decode_worker() as bench:
        await idle_until_asleep(bench)
        bench.now = 60.0
        await bench.decide()
        assert bench.heard.told == []
        bench.now = 61.5
        await bench.decide()
        assert bench.heard.told == [("decode", 0)]
        bench.lose("decode-0")
        bench.demand = WAITING
        bench.now = 62.0
        await bench.decide()
        assert bench.heard.told == [("decode", 0), ("decode", 1)]
        assert bench.heard.requested == [(Role.DECODE, False)]


async def test_who_would_not_sleep_is_told_again():
    async with one_decode_worker() as bench:
        await idle_until_asleep(bench)
        answer(bench, "decode-0", asleep=False)  # it had work after all
        bench.now = 12.0
        await bench.decide()
        assert bench.registry.get("decode-0").slumber.rest is Rest.FALLING
        assert bench.heard.told == []


async def test_who_dies_asleep_is_not_started_again():
    async with one_decode_worker() as bench:
        await idle_until_asleep(bench)
        bench.lose("decode-0")
        await bench.decide()
        assert bench.heard.told == [("decode", 0)]


async def test_a_router_that_starts_again_keeps_what_it_finds_asleep():
    async with running(prefill=replace(KEEPING, max=0), decode=KEEPING) as bench:
        bench.join("decode-0")
        answer(bench, "decode-0", asleep=True)
        bench.demand = IDLE
        for bench.now in (1.0, 30.0, 49.0):
            await bench.decide()
        assert bench.heard.told == []
        assert bench.registry.get("decode-0").slumber.rest is Rest.ASLEEP
        bench.demand = FleetDemand(waiting=1, arrived=1, waiting_tokens=40, waiting_blocks=3)
        await bench.decide()
        assert bench.registry.get("decode-0").slumber.rest is Rest.WAKING
        assert bench.heard.told == []
        await until(lambda: bench.heard.requested == [(Role.DECODE, True)])
