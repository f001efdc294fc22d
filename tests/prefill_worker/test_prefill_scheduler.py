"""Exact schedules of the prefill worker; no engine, no torch."""

import pytest

from kvrelay_engine.batch import StepResult
from kvrelay_engine.cache.allocator import BlockAllocator
from kvrelay_engine.sequence import FinishReason, SequenceFailed, SequenceSpec
from kvrelay_prefill.scheduler import Admitted, FirstToken, PrefillScheduler
from kvrelay_protocol.errors import InternalError
from kvrelay_protocol.sampling import SamplingParams

BLOCK = 4


def make_scheduler(blocks=16, batch=8, sequences=8):
    return PrefillScheduler(
        BlockAllocator(blocks, BLOCK),
        fingerprint="model",
        max_batch_tokens=batch,
        max_sequences=sequences,
    )


def spec(sequence_id, length, *, max_tokens=5, stop=(), base=0, salt=b""):
    return SequenceSpec(
        sequence_id=sequence_id,
        request_id=f"r{sequence_id}",
        tokens=tuple(base + n for n in range(length)),
        output_offset=0,
        max_tokens=max_tokens,
        stop_token_ids=frozenset(stop),
        sampling=SamplingParams(temperature=0.0),
        deadline_s=60.0,
        cache_salt=salt,
    )


def step(scheduler, token=99):
    """One turn of the loop; returns (id, start, length, samples) of each slice."""
    batch = scheduler.schedule()
    if batch is None:
        return None
    scheduler.commit(
        batch,
        StepResult({s.sequence_id: token for s in batch.slices if s.sampling is not None}),
    )
    scheduler.allocator.check_integrity()
    return [(s.sequence_id, s.start, len(s.tokens), s.sampling is not None) for s in batch.slices]


def test_a_long_prompt_is_computed_in_whole_blocks_until_its_rest_fits():
    scheduler = make_scheduler(batch=8)
    scheduler.submit(spec(1, 19))
    assert step(scheduler) == [(1, 0, 8, False)]
    assert step(scheduler) == [(1, 8, 8, False)]
    assert step(scheduler) == [(1, 16, 3, True)]
    assert step(scheduler) is None
    admitted, first = scheduler.take_events()
    assert admitted == Admitted(1, (0, 1, 2, 3, 4), 0, 0)
    assert first == FirstToken(1, 99, None)


def test_prompts_share_a_step_first_come_first_served():
    scheduler = make_scheduler(batch=12)
    for n, length in enumerate([3, 10, 2], start=1):
        scheduler.submit(spec(n, length, base=100 * n))
    assert step(scheduler) == [(1, 0, 3, True), (2, 0, 8, False)]
    assert step(scheduler) == [(2, 8, 2, True), (3, 0, 2, True)]


def test_a_prompt_that_finds_no_blocks_waits_and_nobody_overtakes_it():
    scheduler = make_scheduler(blocks=4, batch=64)
    scheduler.submit(spec(1, 12))
    scheduler.submit(spec(2, 8, base=100))
    scheduler.submit(spec(3, 4, base=200))
    assert step(scheduler) == [(1, 0, 12, True)]
    assert step(scheduler) is None
    scheduler.release(1)
    assert step(scheduler) == [(2, 0, 8, True), (3, 0, 4, True)]


def test_blocks_stay_until_release_and_are_cached_after():
    scheduler = make_scheduler()
    scheduler.submit(spec(1, 9))
    step(scheduler, token=7)
    assert scheduler.allocator.counts.in_use == 3
    scheduler.release(1)
    scheduler.release(1)
    counts = scheduler.allocator.counts
    assert (counts.cached, counts.in_use) == (2, 0)
    scheduler.check_integrity()


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_always_is():
    scheduler = make_scheduler(batch=64)
    scheduler.submit(spec(1, 8))
    step(scheduler)
    scheduler.release(1)
    scheduler.submit(spec(2, 8))
    scheduler.submit(spec(3, 10))
    assert step(scheduler) == [(2, 4, 4, True), (3, 8, 2, True)]
    scheduler.submit(spec(4, 10, salt=b"other"))
    assert step(scheduler) == [(4, 0, 10, True)]
    assert scheduler.load().prefix_hits == 12


@pytest.mark.parametrize("when", ["waiting", "computing", "held"])
def test_release_gives_everything_back_at_any_stage(when):
    scheduler = make_scheduler(batch=8)
    scheduler.submit(spec(1, 12))
    if when != "waiting":
        step(scheduler)
    if when == "held":
        step(scheduler)
    scheduler.release(1)
    assert scheduler.schedule() is None
    scheduler.check_integrity()
    assert scheduler.load().used_blocks == 0


def test_a_first_token_can_be_the_last():
    scheduler = make_scheduler()
    scheduler.submit(spec(1, 3, stop=[42]))
    step(scheduler, token=42)
    scheduler.submit(spec(2, 3, max_tokens=1, base=50))
    step(scheduler, token=8)
    ends = [e.finish for e in scheduler.take_events() if isinstance(e, FirstToken)]
    assert ends == [FinishReason.STOP, FinishReason.LENGTH]


def test_the_batch_is_bounded_in_sequences():
    scheduler = make_scheduler(batch=64, sequences=2)
    for n in range(4):
        scheduler.submit(spec(n, 2, base=10 * n))
    assert len(step(scheduler)) == 2
    assert len(step(scheduler)) == 2


def test_a_prompt_without_a_token_fails_alone_and_none_of_its_kv_is_found_again():
    scheduler = make_scheduler(batch=8)
    scheduler.submit(spec(1, 10))
    step(scheduler)
    scheduler.submit(spec(2, 3, base=50))
    batch, error = scheduler.schedule(), InternalError("not finite")
    scheduler.commit(batch, StepResult({2: 9}, {1: error}))
    events = scheduler.take_events()
    assert SequenceFailed(1, error) in events
    assert FirstToken(2, 9, None) in events
    assert scheduler.allocator.counts.in_use == 4, "a gather may read its blocks until the release"
    scheduler.release(1)
    scheduler.release(2)
    assert scheduler.allocator.counts.free == scheduler.allocator.counts.total
    scheduler.submit(spec(3, 10))
    assert step(scheduler) == [(3, 0, 8, False)]
