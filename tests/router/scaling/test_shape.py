"""One pool or two: when prompts get workers of their own, and when they lose them."""

from dataclasses import replace

import pytest
from fleets import BLOCKS, CONFIG, POOL, decode_load, fleet, obeyed, prefill_load
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay_router.scaling import Memory, PoolConfig, PrefillLoad, Targets, decide
from kvrelay_router.scaling.shape import Sizes, reshape
from kvrelay_router.scaling.state import ShapeMemory


def _steps(state, seconds, load, config=CONFIG, *, local_speed=1000.0):
    """Decisions, one a second, on a constant load that the fleet obeys at once."""
    memory, decisions, own = Memory(), [], None
    for now in range(seconds):
        own = 1000.0 if state.prefill.ready else own
        state = replace(
            state,
            prefill_load=replace(load["prompts"], tokens_per_second=own or local_speed,
                                 local_tokens_per_second=local_speed),
            decode_load=decode_load(state.decode.ready, used_blocks=load["blocks"],
                                    streams=load["streams"]),
        )  # fmt: skip
        decision = decide(state, float(now), config, memory)
        memory, state = decision.memory, obeyed(state, decision)
        decisions.append(decision)
    return decisions


def _load(tokens_per_second, blocks=100, uncached=100):
    prompts = prefill_load(arriving_tokens_per_second=tokens_per_second, uncached_tokens=uncached)
    return {"prompts": prompts, "blocks": blocks, "streams": 1}


def test_decode_workers_with_room_take_the_prompts_over_under_load():
    decisions = _steps(fleet(1, 1), 90, _load(300.0))
    assert decisions[-1].targets == Targets(0, 1)
    # Not before it has lasted for the stabilisation time.
    assert decisions[29].targets == Targets(1, 1)


def test_prefill_workers_stay_until_the_decode_workers_that_replace_them_are_there():
    """Two pools of 1 + 2 for what two decode workers can do, one of which is not up yet."""
    load = _load(700.0, blocks=int(1.5 * BLOCKS))
    memory = Memory(shape=ShapeMemory(apart=False), started_at=0.0, decided_at=99.0,
                    decode_wanted=1.9, decode_why="occupancy")  # fmt: skip
    state = fleet(prefill=1, decode=1, prefill_load=load["prompts"],
                  decode_load=decode_load(1, used_blocks=900, waiting_blocks=600, streams=3))  # fmt: skip
    waiting = decide(state, 100.0, CONFIG, memory)
    assert waiting.targets == Targets(1, 2)
    there = replace(state, decode=replace(state.decode, ready=2, desired=2),
                    decode_load=decode_load(2, used_blocks=1500, streams=3))  # fmt: skip
    gone = decide(there, 101.0, CONFIG, waiting.memory)
    assert (gone.targets, gone.reasons.prefill) == (Targets(0, 2), "merged")


def test_a_large_fleet_stays_apart_where_streams_slow_prompts_down():
    """Five workers' worth of prompts, at 36 % of the speed beside the streams of six workers."""
    load = _load(4800.0, blocks=int(5.6 * 0.8 * BLOCKS), uncached=1000)
    config = replace(CONFIG, split_utilisation=0.8)
    slowed = _steps(fleet(6, 6), 200, load, config, local_speed=360.0)
    assert slowed[-1].targets == Targets(6, 6)
    # Without that, the same decode workers do it alone.
    assert _steps(fleet(6, 6), 200, load, config)[-1].targets == Targets(0, 6)


def test_what_the_decode_pool_may_not_grow_to_wakes_prefill_at_once():
    config = replace(CONFIG, decode=replace(POOL, max=2), split_utilisation=0.8)
    assert _steps(fleet(0, 2), 1, _load(3000.0), config)[0].targets == Targets(4, 2)


def test_a_prefill_minimum_keeps_the_pools_apart():
    config = replace(CONFIG, prefill=replace(POOL, min=1))
    decision = _steps(fleet(1, 1), 90, _load(300.0), config)[-1]
    assert decision.targets == Targets(1, 1)
    assert decision.memory.shape.apart


def test_one_pool_by_its_settings_is_never_apart():
    config = replace(CONFIG, prefill=PoolConfig(max=0))
    decision = _steps(fleet(0, 1), 5, _load(300.0), config)[-1]
    assert decision.memory.shape == ShapeMemory(apart=False)


@pytest.mark.parametrize("prefill", [PoolConfig(max=0), POOL])
def test_a_burst_that_is_over_does_not_hold_decode_workers(prefill):
    """Its rate is still in the average, and calls for more than the pool may have."""
    config = replace(CONFIG, prefill=prefill, decode=replace(POOL, max=2))
    prompts = prefill_load(arriving_tokens_per_second=9000.0, idle_s=61.0)
    memory = Memory(shape=ShapeMemory(apart=False), started_at=0.0)
    state = fleet(decode=1, prefill_load=prompts, decode_load=decode_load(1, idle_s=61.0))
    decision = decide(state, 100.0, config, memory)
    assert (decision.targets.decode, decision.reasons.decode) == (0, "idle")


def test_a_missing_metric_keeps_the_shape():
    memory = Memory(shape=ShapeMemory(apart=True, other_since=0.0), started_at=0.0)
    state = fleet(prefill=1, decode=1, prefill_load=PrefillLoad(tokens_per_second=1000.0))
    decision = decide(state, 999.0, CONFIG, memory)
    assert decision.memory.shape == memory.shape
    assert decision.targets.prefill == 1


def test_another_shape_must_be_preferred_without_a_break():
    apart = Sizes(together=3, most=9, streams=1, prompts=1)
    together = Sizes(together=1, most=9, streams=1, prompts=1)
    mine = ShapeMemory(apart=False)
    for now, sizes in ((0, apart), (9, apart), (10, together), (11, apart), (20, apart)):
        mine = reshape(mine, sizes, float(now), stabilisation_s=10.0)
        assert not mine.apart
    assert reshape(mine, apart, 21.0, stabilisation_s=10.0).apart


@settings(max_examples=25, deadline=None)
@given(
    start=st.tuples(st.integers(0, 9), st.integers(1, 12)),
    rate=st.floats(0, 6000),
    blocks=st.integers(0, 9000),
    slowed=st.floats(0.3, 1.0),
    split=st.floats(0.3, 1.0),
)
def test_constant_load_settles_whatever_streams_cost_prompts(start, rate, blocks, slowed, split):
    """The measured speed changes with the shape, which must not change the shape for ever."""
    config = replace(CONFIG, split_utilisation=split)
    load = _load(rate, blocks)
    decisions = _steps(fleet(*start), 250, load, config, local_speed=1000.0 * slowed)
    assert len({d.targets for d in decisions[150:]}) == 1
