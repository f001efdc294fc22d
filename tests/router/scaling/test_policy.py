"""Waking, splitting, going to zero, damping and the budget, case by case."""

from dataclasses import replace

import pytest
from fleets import BLOCKS, CONFIG, POOL, after, decode_load, fleet, obeyed, pool, prefill_load

from kvrelay_router.scaling import (
    Budget,
    DemandMeter,
    FleetState,
    Memory,
    PoolConfig,
    ScalerConfig,
    Targets,
    decide,
)


def test_nothing_known_and_nothing_wanted_stays_at_zero():
    assert decide(FleetState(), 0, CONFIG, Memory()).targets == Targets(0, 0)


def test_a_parked_request_wakes_one_decode_worker_alone():
    state = fleet(parked=1, arrived=1, prefill_load=prefill_load(uncached_tokens=500))
    decision = decide(state, 0, CONFIG, Memory())
    assert decision.targets == Targets(0, 1)
    assert decision.reasons.decode == "wake"


def test_a_hundred_parked_requests_wake_one_decode_worker_and_only_once():
    state = fleet(parked=100, arrived=100)
    first = decide(state, 0, CONFIG, Memory())
    starting = replace(state, decode=pool(0, pending=(0.0,)), arrived=5)
    second = decide(starting, 1, CONFIG, first.memory)
    assert (first.targets.decode, second.targets.decode) == (1, 1)


def test_a_large_parked_backlog_wakes_prefill_in_the_same_decision():
    load = prefill_load(uncached_tokens=60_000)
    decision = decide(fleet(parked=9, prefill_load=load), 0, CONFIG, Memory())
    assert decision.targets.decode == 1
    assert decision.targets.prefill > 0
    assert decision.reasons.prefill == "backlog"


def test_prefill_with_a_minimum_wakes_with_the_first_decision():
    config = replace(CONFIG, prefill=replace(POOL, min=2))
    assert decide(fleet(parked=1), 0, config, Memory()).targets == Targets(2, 1)


def test_prefill_of_unknown_speed_stays_at_zero_until_a_decode_worker_has_measured_it():
    load = prefill_load(uncached_tokens=60_000, tokens_per_second=None)
    decision = decide(fleet(parked=9, prefill_load=load), 0, CONFIG, Memory())
    assert decision.targets == Targets(0, 1)


def test_decode_workers_alone_keep_a_few_prompts_and_prefill_wakes_for_many():
    few = prefill_load(arriving_tokens_per_second=400.0)
    many = prefill_load(arriving_tokens_per_second=600.0)
    load = decode_load(1, streams=1, used_blocks=9)
    assert after(fleet(decode=1, prefill_load=few, decode_load=load), 60).targets.prefill == 0
    assert after(fleet(decode=1, prefill_load=many, decode_load=load), 60).targets.prefill == 1


def test_one_aggregated_pool_grows_with_its_prompts():
    config = replace(CONFIG, prefill=PoolConfig(min=0, max=0))
    load = prefill_load(arriving_tokens_per_second=3000.0, uncached_tokens=100)
    state = fleet(decode=1, prefill_load=load, decode_load=decode_load(1, streams=2))
    assert decide(state, 0, config, Memory()).targets == Targets(0, 4)


def test_live_streams_ask_for_decode_workers_whatever_they_hold():
    state = fleet(decode=1, decode_load=decode_load(1, streams=130, used_blocks=10))
    decision = decide(state, 0, CONFIG, Memory())
    assert (decision.targets.decode, decision.reasons.decode) == (3, "streams")


def test_a_pool_goes_to_zero_after_idle_and_not_before():
    state = fleet(prefill=1, decode=2)
    memory, zero_at = Memory(), {}
    for now in range(200):
        idle = float(now)
        state = replace(state, prefill_load=prefill_load(idle_s=idle),
                        decode_load=decode_load(state.decode.ready, idle_s=idle))  # fmt: skip
        decision = decide(state, float(now), CONFIG, memory)
        memory, state = decision.memory, obeyed(state, decision)
        for name in ("prefill", "decode"):
            if getattr(decision.targets, name) == 0:
                zero_at.setdefault(name, now)
    assert zero_at == {"prefill": 60, "decode": 60}


def test_a_scaler_just_started_takes_nobody_elses_word_for_idle():
    state = fleet(decode=2, decode_load=decode_load(2, idle_s=9999))
    decision = decide(state, 0, CONFIG, Memory())
    assert decision.targets.decode == 2


def test_fewer_must_suffice_for_the_stabilisation_time_and_the_highest_need_of_it_stays():
    memory, seen = Memory(), []
    for now in range(60):
        used = 2500 if now == 20 else 100
        load = decode_load(5, used_blocks=used, streams=1)
        state = fleet(decode=5, decode_load=load)
        config = replace(CONFIG, decode=replace(POOL, start_s=0))
        state = replace(state, decode=replace(state.decode, start_s=0.0))
        decision = decide(state, float(now), config, memory)
        memory = decision.memory
        seen.append(decision.targets.decode)
        if decision.targets.decode < 5:
            break
    assert (len(seen) - 1, seen[-1]) == (30, 4)  # 2500 blocks at 80 % of 1000 each


def test_a_burst_shorter_than_a_start_starts_nothing():
    calm = fleet(decode=1, decode_load=decode_load(1, used_blocks=500, streams=1))
    burst = fleet(decode=1, decode_load=decode_load(1, used_blocks=950, streams=1))
    memory = Memory()
    for now in range(100):
        decision = decide(burst if now == 50 else calm, float(now), CONFIG, memory)
        memory = decision.memory
        assert decision.targets.decode == 1


def test_the_budget_takes_prefill_first_and_leaves_the_last_decode_worker():
    config = replace(CONFIG, budget=Budget(replicas=4))
    state = fleet(
        prefill=1,
        decode=3,
        prefill_load=prefill_load(arriving_tokens_per_second=9000.0),
        decode_load=decode_load(3, used_blocks=3 * BLOCKS, streams=9),
    )
    decision = decide(state, 0, config, Memory())
    assert decision.targets == Targets(0, 4)
    assert decision.reasons.prefill == "budget"


def test_an_hourly_budget_is_kept_by_a_fleet_that_obeys():
    config = replace(CONFIG, budget=Budget(replica_seconds_per_hour=7200))
    state = fleet(
        prefill=1,
        decode=1,
        prefill_load=prefill_load(arriving_tokens_per_second=9000.0),
        decode_load=decode_load(1, streams=1),
    )
    memory, spent, most = Memory(), 0, 0
    for now in range(3600):
        decision = decide(state, float(now), config, memory)
        memory, state = decision.memory, obeyed(state, decision)
        total = decision.targets.prefill + decision.targets.decode
        spent, most = spent + total, max(most, total)
    assert most > 2
    assert 7000 < spent <= 7200


@pytest.mark.parametrize(("make", "says"), [
    (lambda: PoolConfig(min=3, max=2), "min 3 must be from 0 to max 2"),
    (lambda: PoolConfig(idle_s=-1), "idle_s -1 must not be negative"),
    (lambda: ScalerConfig(target_utilisation=1.5), "target_utilisation 1.5"),
    (lambda: ScalerConfig(decode=PoolConfig(max=0)), "decode.max 0 serves nothing"),
    (lambda: Budget(replicas=0), "0 replicas must be at least 1"),
    (lambda: ScalerConfig(prefill=PoolConfig(min=1), budget=Budget(replicas=1)), "below the 2"),
    (lambda: ScalerConfig(prefill=PoolConfig(min=1), budget=Budget(None, 3600)), "at least 7200"),
])  # fmt: skip
def test_settings_that_cannot_be_met_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_the_meter_averages_over_its_window_and_leaves_out_what_caches_save():
    meter = DemandMeter(window_s=100)
    for second in range(200):
        meter.arrived(float(second), 50)
    assert meter.tokens_per_second(199.0) == pytest.approx(50)
    meter.computed(199.0, prompt=100, cached=60)
    assert meter.tokens_per_second(199.0) == pytest.approx(20)
    assert meter.tokens_per_second(299.5) == 0


def test_the_meter_takes_one_long_prompt_for_no_trend():
    meter = DemandMeter()
    meter.arrived(0.0, 90_000)
    assert meter.tokens_per_second(0.0) == pytest.approx(3000)
