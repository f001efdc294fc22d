"""Exact schedules of the decode worker; no engine, no torch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay_decode.scheduler import (
    DecodeScheduler,
    LocalPrefillStarted,
    Reserved,
    TokenSampled,
)
from kvrelay_engine.batch import StepResult, TokenLogprobs
from kvrelay_engine.cache.allocator import BlockAllocator
from kvrelay_engine.sequence import FinishReason, SequenceFailed, SequenceSpec
from kvrelay_protocol.errors import InternalError, InvalidRequest
from kvrelay_protocol.sampling import SamplingParams

BLOCK = 4


def make_scheduler(blocks=16, batch=8, sequences=8):
    return DecodeScheduler(
        BlockAllocator(blocks, BLOCK),
        fingerprint="model",
        max_batch_tokens=batch,
        max_sequences=sequences,
    )


def spec(sequence_id, length, *, max_tokens=5, stop=(), base=0, offset=0, **sampling):
    return SequenceSpec(
        sequence_id=sequence_id,
        request_id=f"r{sequence_id}",
        tokens=tuple(base + n for n in range(length)),
        output_offset=offset,
        max_tokens=max_tokens,
        stop_token_ids=frozenset(stop),
        sampling=SamplingParams(temperature=0.0, **sampling),
        deadline_s=60.0,
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
    scheduler.check_integrity()
    return [(s.sequence_id, s.start, len(s.tokens), s.sampling is not None) for s in batch.slices]


def sampled(scheduler):
    return [e for e in scheduler.take_events() if isinstance(e, TokenSampled)]


def test_a_lease_is_promised_then_runs_from_the_first_token():
    scheduler = make_scheduler()
    scheduler.reserve(spec(1, 6, max_tokens=3))
    assert step(scheduler) is None
    assert scheduler.take_events() == [Reserved(1, (0, 1), 0, 1)]
    assert scheduler.load().leased_blocks == 2
    scheduler.start(1, first_token=50)
    assert scheduler.load().leased_blocks == 0
    assert step(scheduler) == [(1, 6, 1, True)]
    assert step(scheduler) == [(1, 7, 1, True)]
    assert sampled(scheduler) == [
        TokenSampled(1, 1, 99, None),
        TokenSampled(1, 2, 99, FinishReason.LENGTH),
    ]
    assert step(scheduler) is None
    assert scheduler.load().used_blocks == 0


def test_a_replay_numbers_its_tokens_from_where_the_stream_stopped():
    scheduler = make_scheduler()
    scheduler.submit(spec(1, 6, offset=4))
    step(scheduler)
    assert sampled(scheduler) == [TokenSampled(1, 4, 99, None)]


def test_running_sequences_get_a_token_each_before_prompts_get_the_rest():
    scheduler = make_scheduler(batch=8)
    scheduler.submit(spec(1, 4))
    assert step(scheduler) == [(1, 0, 4, True)]
    scheduler.submit(spec(2, 19, base=100))
    assert step(scheduler) == [(1, 4, 1, True), (2, 0, 8, False)]
    assert step(scheduler) == [(1, 5, 1, True), (2, 8, 8, False)]
    assert step(scheduler) == [(1, 6, 1, True), (2, 16, 3, True)]
    assert step(scheduler)[1] == (2, 19, 1, True)


def test_the_youngest_is_preempted_and_computed_again_with_its_own_tokens():
    scheduler = make_scheduler(blocks=4, batch=16)
    scheduler.submit(spec(1, 7, max_tokens=9))
    scheduler.submit(spec(2, 3, max_tokens=9, base=100))
    assert step(scheduler) == [(1, 0, 7, True), (2, 0, 3, True)]
    assert step(scheduler) == [(1, 7, 1, True), (2, 3, 1, True)]
    while not scheduler.load().preemptions:
        slices = step(scheduler)
    assert [s[0] for s in slices] == [1], "the older one goes on"
    while scheduler.load().running or scheduler.load().waiting:
        slices = step(scheduler)
        if scheduler.load().preemptions and slices[0][0] == 2 and slices[0][2] > 1:
            # What it computes again includes the tokens it had sampled already.
            assert slices[0][1] + slices[0][2] > 3
    assert scheduler.load().preemptions == 1
    events = scheduler.take_events()
    for sequence_id in (1, 2):
        tokens = [e for e in events if isinstance(e, TokenSampled) and e.sequence_id == sequence_id]
        assert [e.index for e in tokens] == list(range(9))
        started = [e for e in events if isinstance(e, LocalPrefillStarted)]
        assert [e.sequence_id for e in started].count(sequence_id) == 1
    scheduler.check_integrity()


def test_a_prefix_at_hand_is_part_of_the_promise():
    scheduler = make_scheduler()
    scheduler.submit(spec(1, 8, max_tokens=1))
    step(scheduler)
    scheduler.take_events()
    scheduler.reserve(spec(2, 8))
    scheduler.schedule()
    (reserved,) = scheduler.take_events()
    assert (reserved.first_block, len(reserved.blocks)) == (2, 3)
    # A prompt computed here keeps its last token to compute, or there would be no logits.
    scheduler.submit(spec(3, 8))
    assert step(scheduler) == [(3, 4, 4, True)]


@pytest.mark.parametrize("stage", ["waiting", "leased", "running"])
def test_abort_gives_everything_back_at_any_stage(stage):
    scheduler = make_scheduler()
    scheduler.reserve(spec(1, 6))
    if stage != "waiting":
        scheduler.schedule()
    if stage == "running":
        scheduler.start(1, 5)
        step(scheduler)
    scheduler.abort(1)
    scheduler.abort(1)
    assert scheduler.schedule() is None
    counts = scheduler.allocator.counts
    assert counts.free + counts.cached == counts.total


def test_a_promise_waits_until_blocks_are_back():
    scheduler = make_scheduler(blocks=4)
    scheduler.reserve(spec(1, 12))
    scheduler.reserve(spec(2, 4, base=50))
    scheduler.schedule()
    assert [e.sequence_id for e in scheduler.take_events()] == [1]
    scheduler.abort(1)
    scheduler.schedule()
    assert [e.sequence_id for e in scheduler.take_events()] == [2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 14), st.integers(1, 12), st.booleans()), min_size=1, max_size=8
    ),
    st.integers(7, 12),
)
def test_every_sequence_ends_with_each_token_once_however_small_the_pool(requests, blocks):
    scheduler = make_scheduler(blocks=blocks, batch=8)
    seen: dict[int, list[int]] = {}
    for n, (length, tokens, leased) in enumerate(requests):
        enter = scheduler.reserve if leased else scheduler.submit
        enter(spec(n, length, max_tokens=tokens, base=100 * n))
    for turn in range(2000):
        progress = step(scheduler, token=turn + 10_000)
        for event in scheduler.take_events():
            if isinstance(event, Reserved):
                if requests[event.sequence_id][1] == 1:
                    scheduler.abort(event.sequence_id)  # its first token was its last
                    seen[event.sequence_id] = [0]
                else:
                    seen[event.sequence_id] = [0]
                    scheduler.start(event.sequence_id, 7)
            elif isinstance(event, TokenSampled):
                seen.setdefault(event.sequence_id, []).append(event.index)
        load = scheduler.load()
        if progress is None and not load.running and not load.waiting:
            break
    assert seen == {n: list(range(tokens)) for n, (_, tokens, _) in enumerate(requests)}
    counts = scheduler.allocator.counts
    assert counts.free + counts.cached == counts.total


def test_a_sequence_without_a_token_fails_alone_and_its_blocks_are_forgotten():
    scheduler = make_scheduler(batch=16)
    scheduler.submit(spec(1, 6))
    scheduler.submit(spec(2, 6, base=50))
    step(scheduler)
    scheduler.take_events()
    error = InternalError("not finite")
    scheduler.commit(scheduler.schedule(), StepResult({2: 9}, {1: error}))
    assert scheduler.take_events() == [SequenceFailed(1, error), TokenSampled(2, 1, 9, None)]
    scheduler.check_integrity()
    counts = scheduler.allocator.counts
    assert (counts.cached, counts.in_use) == (0, 2)
    assert [s[0] for s in step(scheduler)] == [2]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_leases_that_come_late_or_never_neither_block_nor_leak(data):
    """Preemption beside pending leases: whatever the order, everybody ends once."""
    scheduler = make_scheduler(blocks=data.draw(st.integers(6, 10)), batch=8)
    waiting = {n: data.draw(st.integers(1, 10)) for n in range(6)}
    for n, tokens in waiting.items():
        enter = scheduler.reserve if data.draw(st.booleans()) else scheduler.submit
        enter(spec(n, data.draw(st.integers(1, 12)), max_tokens=tokens + 1, base=100 * n))
    leases, ended = [], []
    for _ in range(600):
        step(scheduler)
        for event in scheduler.take_events():
            if isinstance(event, Reserved):
                leases.append(event.sequence_id)
            elif isinstance(event, TokenSampled) and event.finish:
                ended.append(event.sequence_id)
        if leases and data.draw(st.booleans()):
            sequence_id = leases.pop(data.draw(st.integers(0, len(leases) - 1)))
            if data.draw(st.booleans()):
                scheduler.start(sequence_id, 7)
            else:
                scheduler.abort(sequence_id)
                ended.append(sequence_id)
        if len(ended) == len(waiting):
            break
    assert sorted(ended) == sorted(waiting)
    assert step(scheduler) is None
    counts = scheduler.allocator.counts
    assert counts.free + counts.cached == counts.total


def histories(scheduler, token=99):
    """What the sampler is told in one step: counts by token, and banned tokens, of each sequence."""
    batch = scheduler.schedule()
    found = {}
    for part in batch.slices:
        counts = part.history and part.history.counts
        pairs = counts and zip(counts.tokens.tolist(), counts.output_counts.tolist(), strict=True)
        found[part.sequence_id] = (pairs and dict(pairs), part.history and part.history.banned)
    scheduler.commit(
        batch,
        StepResult({s.sequence_id: token for s in batch.slices if s.sampling is not None}),
    )
    return found


def test_the_sampler_is_told_of_tokens_only_where_penalties_ask():
    scheduler = make_scheduler(batch=16)
    scheduler.submit(spec(1, 3))
    scheduler.submit(spec(2, 3, base=50, presence_penalty=1.0))
    assert histories(scheduler) == {1: (None, None), 2: ({50: 0, 51: 0, 52: 0}, ())}
    assert histories(scheduler) == {1: (None, None), 2: ({50: 0, 51: 0, 52: 0, 99: 1}, ())}


def test_tokens_generated_before_a_replay_or_on_another_worker_count_as_output():
    scheduler = make_scheduler(batch=16)
    scheduler.submit(spec(1, 6, offset=4, frequency_penalty=1.0))
    assert histories(scheduler)[1][0] == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1, 5: 1}
    scheduler.reserve(spec(2, 3, base=50, frequency_penalty=1.0))
    histories(scheduler)
    scheduler.start(2, first_token=51)
    assert histories(scheduler)[2][0] == {50: 0, 51: 1, 52: 0}


def test_preempted_tokens_are_counted_once():
    scheduler = make_scheduler(blocks=4, batch=16)
    scheduler.submit(spec(1, 7, max_tokens=9))
    scheduler.submit(spec(2, 3, max_tokens=9, base=100, frequency_penalty=1.0))
    generated = 0
    while scheduler.load().running or scheduler.load().waiting or not generated:
        found = histories(scheduler)
        if 2 in found and found[2][0] is not None:
            assert found[2][0].get(99, 0) == generated
            generated += 1
    assert (generated, scheduler.load().preemptions) == (9, 1)


def test_stop_tokens_are_banned_until_the_answer_is_long_enough():
    scheduler = make_scheduler(batch=16)
    scheduler.submit(spec(1, 3, min_tokens=2, stop=(7,)))
    scheduler.submit(spec(2, 5, offset=1, base=50, min_tokens=2, stop=(8,)))
    assert histories(scheduler) == {1: (None, (7,)), 2: (None, (8,))}
    assert histories(scheduler) == {1: (None, (7,)), 2: (None, None)}
    assert histories(scheduler) == {1: (None, None), 2: (None, None)}


def test_logprobs_come_with_their_token():
    scheduler = make_scheduler(batch=16)
    scheduler.submit(spec(1, 3))
    found = TokenLogprobs(-0.5, 1, ())
    scheduler.commit(scheduler.schedule(), StepResult({1: 9}, logprobs={1: found}))
    assert sampled(scheduler) == [TokenSampled(1, 0, 9, None, found)]


def test_a_stop_token_outside_the_vocabulary_cannot_be_banned():
    with pytest.raises(InvalidRequest, match="stop token 12 is outside"):
        spec(1, 3, min_tokens=1, stop=(12,)).check(vocab_size=10)
    spec(1, 3, stop=(12,)).check(vocab_size=10)
