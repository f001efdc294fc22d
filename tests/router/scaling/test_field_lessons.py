"""What others paid for, one test each."""

from dataclasses import replace

import pytest
from fleets import BLOCKS, CONFIG, after, decode_load, fleet, pool, prefill_load

from kvrelay_router.requests.placement import Role, WorkerState
from kvrelay_router.scaling import (
    Memory,
    PoolMemory,
    decide,
)
from kvrelay_router.scaling import decode_load as observed_decode
from kvrelay_router.scaling import prefill_load as observed_prefill


def _decode_worker(name: str, *, used: int, **more) -> WorkerState:
    return WorkerState(name=name, role=Role.DECODE, block_size=16, total_blocks=BLOCKS,
                       available_blocks=BLOCKS - used, **more)  # fmt: skip


def test_two_full_workers_ask_for_a_third_since_occupancy_is_summed():
    full = [_decode_worker(f"decode-{n}", used=BLOCKS, running=4) for n in range(2)]
    load = observed_decode(full, parked_blocks=0, idle_s=0)
    decision = decide(fleet(decode=2, decode_load=load), 0, CONFIG, Memory())
    assert decision.targets.decode == 3
    assert decision.reasons.decode == "occupancy"


def test_the_load_of_a_worker_that_left_leaves_with_it():
    busy = _decode_worker("busy", used=BLOCKS)
    calm = _decode_worker("calm", used=100)
    both = observed_decode([busy, calm], parked_blocks=0, idle_s=0)
    left = observed_decode([calm], parked_blocks=0, idle_s=0)
    assert (both.used_blocks, both.total_blocks) == (BLOCKS + 100, 2 * BLOCKS)
    assert (left.used_blocks, left.total_blocks) == (100, BLOCKS)
    prompts = WorkerState("prefill-0", Role.PREFILL, 16, BLOCKS, BLOCKS, backlog_tokens=9000)
    for workers, tokens in (([prompts, calm], 9000), ([calm], 0)):
        load = observed_prefill(workers, parked_tokens=0, arriving_tokens_per_second=0, idle_s=0)
        assert load.uncached_tokens == tokens


@pytest.mark.parametrize("metric", ["uncached_tokens", "tokens_per_second",
                                    "arriving_tokens_per_second"])  # fmt: skip
def test_a_missing_prefill_metric_holds_the_pool(metric):
    state = fleet(prefill=4, decode=1, prefill_load=prefill_load(idle_s=9999, **{metric: None}))
    decision = after(state, 600)
    assert (decision.targets.prefill, decision.reasons.prefill) == (4, "missing_metric")


@pytest.mark.parametrize("metric", ["used_blocks", "total_blocks", "waiting_blocks", "streams",
                                    "waiting"])  # fmt: skip
def test_a_missing_decode_metric_holds_the_pool(metric):
    state = fleet(decode=4, decode_load=decode_load(4, idle_s=9999, **{metric: None}))
    decision = after(state, 600)
    assert (decision.targets.decode, decision.reasons.decode) == (4, "missing_metric")


def test_replicas_on_their_way_count_and_a_growing_backlog_does_not_overshoot():
    """Ten times the load on one worker: the backlog grows all through the ten seconds of a start."""
    memory, desired, ready, starts = Memory(), 1, 1, []
    for now in range(12):
        backlog = 9000 * now
        state = fleet(
            prefill=ready,
            decode=1,
            prefill_load=prefill_load(
                uncached_tokens=backlog, arriving_tokens_per_second=10000.0 if now else 1000.0
            ),
        )
        state = replace(state, prefill=pool(ready, pending=tuple(starts)))
        decision = decide(state, float(now), CONFIG, memory)
        memory = decision.memory
        starts += [float(now)] * (decision.targets.prefill - desired)
        desired = decision.targets.prefill
    assert desired == 13  # ten workers' worth of arrivals at 80 % utilisation


def test_replicas_that_never_come_are_cancelled_and_not_asked_for_again_at_once():
    state = fleet(decode=2, decode_load=decode_load(2, used_blocks=2 * BLOCKS, streams=8))
    memory = decide(state, 0, CONFIG, Memory()).memory
    stuck = replace(state, decode=pool(2, pending=(0.0,)))
    waiting = decide(stuck, 119, CONFIG, memory)
    assert waiting.targets.decode == 3
    given_up = decide(stuck, 121, CONFIG, waiting.memory)
    assert (given_up.targets.decode, given_up.reasons.decode) == (2, "start_timeout")
    still = decide(replace(state, decode=pool(2)), 200, CONFIG, given_up.memory)
    assert still.targets.decode == 2
    again = decide(replace(state, decode=pool(2)), 242, CONFIG, still.memory)
    assert again.targets.decode == 3


def test_the_only_replica_somebody_waits_for_is_never_cancelled():
    parked = fleet(parked=1, arrived=1)
    memory = decide(parked, 0, CONFIG, Memory()).memory
    stuck = fleet(parked=1, decode=0)
    stuck = replace(stuck, decode=pool(0, pending=(0.0,)))
    assert decide(stuck, 999, CONFIG, memory).targets.decode == 1


def test_an_idle_timer_that_fires_during_load_takes_no_pool_away():
    """The timer is wrong: a stream runs, or KV is on its way."""
    for busy in ({"decode_load": decode_load(1, streams=1, idle_s=9999)},
                 {"decode_load": decode_load(1, idle_s=9999), "transferring": 1},
                 {"decode_load": decode_load(1, idle_s=9999), "parked": 1},
                 {"decode_load": decode_load(1, waiting=1, idle_s=9999)}):  # fmt: skip
        assert after(fleet(decode=1, **busy), 600).targets.decode == 1


def test_a_second_writer_of_replicas_is_refused():
    mine = Memory(decode=PoolMemory(target=2), started_at=0.0)
    state = fleet(decode=2, decode_load=decode_load(2, used_blocks=1500, streams=3))
    foreign = replace(state, decode=replace(state.decode, desired=7))
    decision = decide(foreign, 5, CONFIG, mine)
    assert (decision.targets.decode, decision.reasons.decode) == (2, "second_writer")


def test_a_request_shorter_than_the_poll_still_wakes():
    """It came and gave up between two decisions: the next one like it should not find zero again."""
    decision = decide(fleet(arrived=1), 15, CONFIG, Memory())
    assert (decision.targets.decode, decision.reasons.decode) == (1, "wake")


def test_what_is_in_flight_of_a_closed_loop_does_not_pin_the_pool_at_its_maximum():
    """A closed loop keeps the same tokens in flight on any number of workers. Its prompts are in
    progress, no backlog: what counts is how much arrives, which four workers do with ease.
    """
    state = fleet(
        prefill=20,
        decode=1,
        prefill_load=prefill_load(uncached_tokens=16000, arriving_tokens_per_second=3000.0),
        decode_load=decode_load(1, streams=20, used_blocks=500),
    )
    assert after(state, 600).targets.prefill == 4


def test_speed_is_that_of_the_computation_where_the_prompts_are_computed():
    """The same load at the speed seen through a slow KV path wants far more replicas."""

    def replicas(speed: float) -> int:
        load = prefill_load(tokens_per_second=speed, arriving_tokens_per_second=17000.0)
        return after(fleet(prefill=1, decode=1, prefill_load=load), 0).targets.prefill

    assert (replicas(2696), replicas(15928)) == (8, 2)
    workers = [
        WorkerState("prefill-0", Role.PREFILL, 16, BLOCKS, BLOCKS, tokens_per_second=15928.0),
        _decode_worker("decode-0", used=0, tokens_per_second=2696.0),
    ]
    load = observed_prefill(workers, parked_tokens=0, arriving_tokens_per_second=0, idle_s=0)
    assert load.tokens_per_second == 15928
