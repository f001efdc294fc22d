"""What holds for every state, whatever the settings."""

from dataclasses import replace

from fleets import CONFIG, after, decode_load, fleet, obeyed, pool, prefill_load
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay_router.scaling import (
    Budget,
    DecodeLoad,
    FleetState,
    Memory,
    PoolConfig,
    PoolState,
    PrefillLoad,
    ScalerConfig,
    decide,
)

_COUNT = st.integers(0, 10**6)
_SECONDS = st.floats(0, 10**5, allow_nan=False)


def _maybe(values):
    return st.none() | values


_POOLS = st.builds(
    PoolState,
    ready=st.integers(0, 40),
    pending=st.lists(_SECONDS, max_size=5).map(lambda times: tuple(sorted(times))),
    draining=st.integers(0, 5),
    desired=st.integers(0, 40),
    start_s=_maybe(_SECONDS),
)
_STATES = st.builds(
    FleetState,
    prefill=_POOLS,
    decode=_POOLS,
    prefill_load=st.builds(
        PrefillLoad,
        uncached_tokens=_maybe(_COUNT),
        tokens_per_second=_maybe(st.floats(0, 1e6)),
        arriving_tokens_per_second=_maybe(st.floats(0, 1e6)),
        idle_s=_maybe(_SECONDS),
    ),
    decode_load=st.builds(
        DecodeLoad,
        used_blocks=_maybe(_COUNT),
        total_blocks=_maybe(_COUNT),
        waiting_blocks=_maybe(_COUNT),
        streams=_maybe(st.integers(0, 5000)),
        waiting=_maybe(st.integers(0, 5000)),
        idle_s=_maybe(_SECONDS),
    ),
    parked=_maybe(st.integers(0, 5000)),
    transferring=_maybe(st.integers(0, 5000)),
    arrived=st.integers(0, 100),
)


@st.composite
def _configs(draw):
    def bounds(least):
        low = draw(st.integers(0, 3))
        return PoolConfig(
            min=low,
            max=draw(st.integers(max(low, least), 30)),
            idle_s=draw(st.floats(0, 600)),
            stabilisation_s=draw(st.floats(0, 600)),
            cooldown_s=draw(st.floats(0, 60)),
        )

    prefill, decode = bounds(0), bounds(1)
    least = prefill.min + max(1, decode.min)
    return ScalerConfig(
        prefill=prefill,
        decode=decode,
        budget=Budget(
            replicas=draw(_maybe(st.integers(least, 60))),
            replica_seconds_per_hour=draw(_maybe(st.floats(3600.0 * least, 1e6))),
        ),
    )


_RUNS = st.lists(st.tuples(_STATES, st.floats(0, 400)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(_RUNS, _configs())
def test_targets_stay_within_bounds_and_budget(run, config):
    memory, now = Memory(), 0.0
    for state, passed in run:
        now += passed
        decision = decide(state, now, config, memory)
        memory = decision.memory
        targets = decision.targets
        assert config.prefill.min <= targets.prefill <= config.prefill.max
        assert targets.decode <= config.decode.max
        assert targets.decode >= config.decode.min
        if config.budget.replicas is not None:
            assert targets.prefill + targets.decode <= config.budget.replicas


@settings(max_examples=60, deadline=None)
@given(_RUNS, _configs())
def test_there_is_a_decode_worker_while_anything_is_parked_streaming_or_in_transfer(run, config):
    memory, now = Memory(), 0.0
    for state, passed in run:
        now += passed
        decision = decide(state, now, config, memory)
        memory = decision.memory
        load = state.decode_load
        if state.parked or state.transferring or state.arrived or load.streams or load.waiting:
            assert decision.targets.decode >= 1
        if state.prefill_load.uncached_tokens:
            assert decision.targets.decode >= 1


@settings(max_examples=30, deadline=None)
@given(_RUNS, _configs())
def test_the_same_arguments_give_the_same_decision(run, config):
    state, now = run[0]
    assert decide(state, now, config, Memory()) == decide(state, now, config, Memory())


@settings(max_examples=25, deadline=None)
@given(
    start=st.integers(1, 12),
    rate=st.floats(0, 8000),
    uncached=st.integers(0, 20_000),
    blocks=st.integers(0, 9000),
    streams=st.integers(1, 500),
)
def test_constant_load_settles_and_then_never_changes(start, rate, uncached, blocks, streams):
    memory, state, targets = Memory(), fleet(start, start), []
    for now in range(160):
        state = replace(
            state,
            prefill_load=prefill_load(uncached_tokens=uncached, arriving_tokens_per_second=rate),
            decode_load=decode_load(state.decode.ready, used_blocks=blocks, streams=streams),
        )
        decision = decide(state, float(now), CONFIG, memory)
        memory, state = decision.memory, obeyed(state, decision)
        targets.append(decision.targets)
    assert len(set(targets[100:])) == 1


@settings(max_examples=60, deadline=None)
@given(parked=st.integers(1, 5000), more=st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_however_many_wait_one_worker_is_woken(parked, more):
    decision = decide(fleet(parked=parked, arrived=parked), 0, CONFIG, Memory())
    memory, wakes = decision.memory, decision.targets.decode
    for second, new in enumerate(more, start=1):
        parked += new
        starting = replace(fleet(parked=parked, arrived=new), decode=pool(0, pending=(0.0,)))
        decision = decide(starting, float(second), CONFIG, memory)
        memory = decision.memory
        wakes = max(wakes, decision.targets.decode)
    assert wakes == 1


@settings(max_examples=60, deadline=None)
@given(parked=st.integers(1, 5000), at=st.floats(0, 100))
def test_a_restart_in_the_middle_of_a_wake_neither_wakes_again_nor_forgets(parked, at):
    starting = replace(fleet(parked=parked), decode=pool(0, pending=(0.0,)))
    assert decide(starting, at, CONFIG, Memory()).targets.decode == 1


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 20), idle=st.floats(0, 1e5), hidden=st.sets(st.sampled_from(
    ["used_blocks", "total_blocks", "waiting_blocks", "streams", "waiting"]), min_size=1))  # fmt: skip
def test_a_missing_metric_holds_the_size(size, idle, hidden):
    load = replace(decode_load(size, idle_s=idle), **dict.fromkeys(hidden))
    assert after(fleet(decode=size, decode_load=load), 120).targets.decode == size


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.floats(0, 3600))
def test_a_restart_while_idle_never_drops_to_zero_at_once(size, idle):
    state = fleet(size, size, prefill_load=prefill_load(idle_s=idle),
                  decode_load=decode_load(size, idle_s=idle))  # fmt: skip
    targets = decide(state, 0, CONFIG, Memory()).targets
    assert (targets.prefill, targets.decode) == (size, size)
