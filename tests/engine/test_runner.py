"""Greedy tokens of whole steps against transformers, however the work is cut into batches."""

import functools

import pytest
import torch
from tiny_models import (
    FAMILIES,
    VOCAB_SIZE,
    clear_case,
    random_prompt,
    reference_generate,
    tiny_model,
)

from kvrelay_engine.batch import Batch, SequenceSlice
from kvrelay_engine.loading import load_engine
from kvrelay_protocol.errors import InternalError
from kvrelay_protocol.sampling import SamplingParams

BLOCK = 16
GREEDY = SamplingParams(temperature=0.0)
NEW_TOKENS = 6
EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 255, 256, 257)
LENGTHS = (*EDGES, *range(5, 590, 8), *range(586, 601))


def prompt_of(family, length):
    return clear_case(tiny_model(family), length, NEW_TOKENS)[0]


def expected(family, length):
    return list(clear_case(tiny_model(family), length, NEW_TOKENS)[1])


@functools.cache
def shared_runner(family):
    """One runner a family; every test brings its own blocks, so nothing needs clearing."""
    return make_runner(family, num_blocks=520)


def make_runner(family, num_blocks):
    return load_engine(
        tiny_model(family), device="cpu", dtype="float32", num_blocks=num_blocks, block_size=BLOCK
    )


class Blocks:
    """Hands out shuffled blocks of a pool and takes them back."""

    def __init__(self, count, seed=0):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        self.free = order.tolist()

    def take(self, tokens):
        return tuple(self.free.pop() for _ in range(-(-tokens // BLOCK)))

    def give(self, table):
        self.free.extend(table)


class Running:
    """A sequence under way: its known tokens, how many are in the pool, its blocks."""

    def __init__(self, number, prompt, table, *, sampling=GREEDY, computed=0):
        self.number = number
        self.prompt = list(prompt)
        self.tokens = list(prompt)
        self.table = table
        self.sampling = sampling
        self.computed = computed

    @property
    def output(self):
        return self.tokens[len(self.prompt) :]

    def slice(self, limit):
        part = tuple(self.tokens[self.computed : self.computed + limit])
        last = self.computed + len(part) == len(self.tokens)
        return SequenceSlice(
            self.number, part, self.computed, self.table, self.sampling if last else None
        )


def step(runner, sequences, chunk, **options):
    """Advance all sequences by one step; returns the batch that was run."""
    batch = Batch(tuple(sequence.slice(chunk) for sequence in sequences))
    result = runner.step(batch, **options)
    wanted = {part.sequence_id for part in batch.slices if part.sampling is not None}
    assert set(result.tokens) == wanted
    for sequence, part in zip(sequences, batch.slices, strict=True):
        sequence.computed += len(part.tokens)
        if part.sequence_id in result.tokens:
            sequence.tokens.append(result.tokens[part.sequence_id])
    return batch


def finish(runner, sequences, chunk, new_tokens=NEW_TOKENS):
    """Run sequences side by side until each has its tokens."""
    while active := [s for s in sequences if len(s.output) < new_tokens]:
        step(runner, active, chunk)


def start(family, number, length, blocks, **options):
    return Running(number, prompt_of(family, length), blocks.take(length + NEW_TOKENS), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_prompts_in_mixed_batches_match_transformers(family):
    """Sequences join in waves, so that prompt chunks and single tokens share every step."""
    runner, blocks = shared_runner(family), Blocks(520)
    waiting = [(number, length) for number, length in enumerate(LENGTHS)]
    active, done = [], {}
    while waiting or active:
        while waiting and len(active) < 12:
            number, length = waiting.pop()
            active.append(start(family, number, length, blocks))
        step(runner, active, chunk=(61, 128, 97)[len(done) % 3])
        for sequence in [s for s in active if len(s.output) == NEW_TOKENS]:
            active.remove(sequence)
            blocks.give(sequence.table)
            done[len(sequence.prompt)] = sequence.output
    assert len(set(LENGTHS)) >= 100
    assert done == {length: expected(family, length) for length in LENGTHS}


@pytest.mark.parametrize("chunk", [1, 5, 16, 33, 64, 600])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_may_be_cut_anywhere(family, chunk):
    for length in (1, 17, 64, 129):
        sequence = start(family, 0, length, Blocks(520, seed=chunk))
        finish(shared_runner(family), [sequence], chunk)
        assert sequence.output == expected(family, length), length


@pytest.mark.parametrize("shared", [16, 32, 240])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_is_not_computed_again(family, shared):
    runner, blocks = shared_runner(family), Blocks(520)
    first = start(family, 0, 257, blocks)
    finish(runner, [first], chunk=100)
    prompt = [*prompt_of(family, 257)[:shared], *random_prompt(40, seed=9)]
    own = blocks.take(len(prompt) + NEW_TOKENS - shared)
    table = first.table[: shared // BLOCK] + own
    # Two sequences on the same prefix at once, one of them cut.
    second = Running(1, prompt, table, computed=shared)
    third = Running(2, prompt_of(family, 257), first.table, computed=256)
    finish(runner, [second, third], chunk=23)
    reference = reference_generate(tiny_model(family), [prompt], NEW_TOKENS)[0]
    assert second.output == reference
    assert third.output == expected(family, 257)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 16, 50, 255])
def test_kv_moved_to_other_blocks_of_another_pool_decodes_on(family, length):
    """Prefill here, push each layer group as it is written, decode there."""
    source, target = shared_runner(family), make_runner(family, num_blocks=40)
    prefill = start(family, 0, length, Blocks(520))
    decode_table = Blocks(40, seed=5).take(length + NEW_TOKENS)
    used = -(-length // BLOCK)
    moved = []

    def push(first, end):
        payload = bytearray(source.pool.wire_bytes(first, end, used))
        valid = (length - 1) % BLOCK + 1
        source.pool.gather(first, end, prefill.table[:used], memoryview(payload), valid)
        target.pool.scatter(first, end, decode_table[:used], memoryview(payload))
        moved.append((first, end))

    while not prefill.output:
        remaining = length - prefill.computed
        last = {"layers_done": push, "group_layers": 2} if remaining <= 100 else {}
        step(source, [prefill], 100, **last)
    assert moved == [(0, 2), (2, 3)]
    assert prefill.output == expected(family, length)[:1]

    decode = Running(7, prefill.prompt, decode_table, computed=length)
    decode.tokens += prefill.output
    finish(target, [decode], chunk=1)
    assert decode.output == expected(family, length)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_after_preemption_goes_on_where_it_stopped(family):
    runner, blocks = shared_runner(family), Blocks(520)
    sequence = start(family, 0, 100, blocks)
    finish(runner, [sequence], chunk=64, new_tokens=3)
    blocks.give(sequence.table)
    other = start(family, 1, 129, blocks)
    finish(runner, [other], chunk=64)
    sequence.computed, sequence.table = 0, blocks.take(100 + NEW_TOKENS)
    finish(runner, [sequence], chunk=50)
    assert sequence.output == expected(family, 100)


@pytest.mark.parametrize(
    ("group", "calls"),
    [
        (None, [(0, 3)]),
        (1, [(0, 1), (1, 2), (2, 3)]),
        (2, [(0, 2), (2, 3)]),
        (3, [(0, 3)]),
        (99, [(0, 3)]),
    ],
)
def test_layer_groups_are_reported_once_in_order_when_their_kv_is_final(group, calls):
    family = "qwen3"
    runner = shared_runner(family)
    sequences = [start(family, 0, 20, blocks := Blocks(520)), start(family, 1, 33, blocks)]
    seen = []

    def layers_done(first, end):
        for sequence in sequences:
            out = bytearray(runner.pool.wire_bytes(first, end, len(sequence.table)))
            runner.pool.gather(first, end, sequence.table, memoryview(out), BLOCK)
            seen.append((first, end, sequence, bytes(out)))

    step(runner, sequences, 64, layers_done=layers_done, group_layers=group)
    assert [(first, end) for first, end, *_ in seen[::2]] == calls
    for first, end, sequence, data in seen:
        out = bytearray(len(data))
        runner.pool.gather(first, end, sequence.table, memoryview(out), BLOCK)
        assert bytes(out) == data


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_a_seeded_draw_does_not_depend_on_the_batch(family):
    runner, blocks = shared_runner(family), Blocks(520)
    settings = [
        SamplingParams(temperature=0.8, top_p=0.9, seed=11),
        SamplingParams(temperature=1.2, top_k=40, seed=11),
        GREEDY,
        SamplingParams(temperature=1.0, min_p=0.05, seed=2**63 + 5),
        SamplingParams(temperature=2.0, seed=12),
    ]
    lengths = [3, 40, 40, 17, 90]
    together = [
        start(family, number, length, blocks, sampling=setting)
        for number, (length, setting) in enumerate(zip(lengths, settings, strict=True))
    ]
    finish(runner, together, chunk=19)
    for number, (length, setting) in enumerate(zip(lengths, settings, strict=True)):
        alone = start(family, number, length, Blocks(520, seed=3), sampling=setting)
        finish(runner, [alone], chunk=600)
        assert alone.output == together[number].output
    assert together[2].output == expected(family, 40)
    assert together[1].output != together[2].output


def test_nothing_is_sampled_where_nothing_is_asked():
    family = "llama2"
    sequence = start(family, 0, 40, Blocks(520))
    part = sequence.slice(16)
    assert part.sampling is None
    assert shared_runner(family).step(Batch((part,))).tokens == {}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (SequenceSlice(4, (), 0, (1,), GREEDY), "sequence 4: no tokens"),
        (SequenceSlice(4, (1,), -1, (1,), GREEDY), "negative start"),
        (SequenceSlice(4, (1,) * 17, 0, (1,), GREEDY), "sequence 4: the block table is too short"),
        (SequenceSlice(4, (1,), 16, (1,), GREEDY), "too short"),
        (SequenceSlice(4, (1,), 0, (520,), GREEDY), "sequence 4: a block is outside the pool"),
        (SequenceSlice(4, (1,), 0, (-1,), GREEDY), "outside the pool"),
        (SequenceSlice(4, (VOCAB_SIZE,), 0, (1,), GREEDY), "outside the vocabulary of 320"),
        (SequenceSlice(4, (-1,), 0, (1,), GREEDY), "outside the vocabulary"),
    ],
)
def test_a_slice_out_of_range_is_refused_before_anything_is_written(part, message):
    runner = shared_runner("llama2")
    before = runner.pool.tensor.clone()
    good = SequenceSlice(1, (1, 2), 0, (0,), GREEDY)
    with pytest.raises(ValueError, match=message):
        runner.step(Batch((good, part)))
    assert torch.equal(runner.pool.tensor, before)


def test_an_empty_batch_and_an_empty_group_are_refused():
    runner = shared_runner("llama2")
    with pytest.raises(ValueError, match="the batch is empty"):
        runner.step(Batch(()))
    part = SequenceSlice(1, (1, 2), 0, (0,), GREEDY)
    with pytest.raises(ValueError, match="group_layers is 0"):
        runner.step(Batch((part,)), group_layers=0)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, seed=3)])
def test_logits_that_are_not_finite_cost_their_sequence_alone_its_token(sampling):
    runner = make_runner("llama2", num_blocks=4)
    runner.pool.tensor[1, 1, 0, 3] = float("nan")
    healthy = SequenceSlice(1, (9,), 16, (2, 3), sampling)
    broken = SequenceSlice(2, (9,), 15, (0,), sampling)
    alone = runner.step(Batch((healthy,))).tokens
    result = runner.step(Batch((healthy, broken)))
    assert result.tokens == alone
    assert isinstance(result.errors[2], InternalError)
    assert result.errors.keys() == {2}


def test_a_block_table_may_be_longer_than_the_step_needs():
    part = SequenceSlice(1, (1, 2), 0, (5,), GREEDY)
    longer = SequenceSlice(1, (1, 2), 0, (5, 6, 10**6), GREEDY)
    runner = shared_runner("llama2")
    assert runner.step(Batch((part,))) == runner.step(Batch((longer,)))
