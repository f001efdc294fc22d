"""The generator's published vectors, and draws as a function of (seed, position, logits)."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_engine.batch import SamplingHistory
from kvrelay_engine.sampler.philox import philox4x32, uniforms
from kvrelay_engine.sampler.sampler import prepare_sampling, sample_tokens, sampled_logprobs
from kvrelay_engine.sampler.token_counts import TokenCounts
from kvrelay_protocol.sampling import SamplingParams

CPU = torch.device("cpu")

# Known-answer vectors of Philox4x32-10 published with Random123: counter, key, output.
VECTORS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return [np.array([int(word, 16)], dtype=np.uint64) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_philox_gives_the_published_answers(counter, key, output):
    result = philox4x32(tuple(words(counter)), tuple(words(key)))
    assert [int(word[0]) for word in result] == [int(word, 16) for word in output.split()]


def test_uniforms_depend_on_seed_and_position_alone():
    seeds, positions = [0, 0, 1, 2**64 - 1, 2**40], [0, 1, 0, 5, 2**33]
    together = uniforms(seeds, positions)
    alone = [uniforms([s], [p])[0] for s, p in zip(seeds, positions, strict=True)]
    assert together.tolist() == alone
    assert len(set(alone)) == 5
    assert uniforms([-1], [5])[0] == together[3]


def test_uniforms_are_spread_evenly():
    draws = uniforms([12345] * 20_000, range(20_000))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    # 20 bins of 1000: five standard deviations.
    assert abs(counts - 1000).max() < 5 * 31


def test_greedy_and_drawn_rows_share_a_batch():
    torch.manual_seed(0)
    logits = torch.randn(6, 50) * 2
    drawn = SamplingParams(temperature=0.9, top_k=10, seed=7)
    greedy = SamplingParams(temperature=0.0, seed=7)
    mixed = [greedy, drawn, greedy, drawn, drawn, greedy]
    positions = [3, 4, 5, 6, 7, 8]
    tokens = sample_tokens(logits, prepare_sampling(mixed, positions, CPU)).tolist()
    for row, (setting, position) in enumerate(zip(mixed, positions, strict=True)):
        single = prepare_sampling([setting], [position], CPU)
        assert sample_tokens(logits[row : row + 1], single).tolist() == [tokens[row]]
        if setting.greedy:
            assert tokens[row] == logits[row].argmax()


def test_the_seed_and_the_position_change_the_draw():
    logits = torch.zeros(1, 1000)

    def draw(seed, position):
        setting = SamplingParams(seed=seed)
        return sample_tokens(logits, prepare_sampling([setting], [position], CPU)).item()

    assert draw(1, 10) == draw(1, 10)
    assert len({draw(seed, 10) for seed in range(20)}) > 15
    assert len({draw(1, position) for position in range(20)}) > 15


def test_no_rows_at_all():
    prepared = prepare_sampling([], [], CPU)
    assert sample_tokens(torch.zeros(0, 5), prepared).tolist() == []


def history(counts=None, banned=()):
    return SamplingHistory(None if counts is None else TokenCounts(*counts), banned)


def choose(logits, params, histories=()):
    prepared = prepare_sampling(params, [5] * len(params), CPU, histories)
    tokens = sample_tokens(logits, prepared)
    return tokens, sampled_logprobs(logits, tokens, prepared, range(len(params)))


@given(
    st.lists(st.integers(0, 9), max_size=20),
    st.lists(st.integers(0, 300), max_size=200),
)
def test_token_counts_are_those_of_a_counter(prompt, output):
    counts = TokenCounts(prompt, output[:7])
    for token in output[7:]:
        counts.add(token)
    found = dict(zip(counts.tokens.tolist(), counts.output_counts.tolist(), strict=True))
    assert found == {**dict.fromkeys(prompt, 0), **Counter(output)}
    assert len(counts.tokens) == len(found)


def test_a_banned_token_is_never_chosen_greedily_or_drawn():
    logits = torch.zeros(2, 6)
    logits[:, 2] = 50.0
    logits[:, 4] = 40.0
    params = [SamplingParams(temperature=0.0), SamplingParams(seed=3)]
    tokens, _ = choose(logits.clone(), params, [history(banned=(2,)), history(banned=(2, 4))])
    assert tokens[0] == 4
    assert tokens[1] not in {2, 4}
    tokens, _ = choose(logits.clone(), params, [None, history(banned=(2,))])
    assert tokens.tolist() == [2, 4]


def test_penalties_concern_their_own_row_and_stay_out_of_the_logprobs():
    logits = torch.tensor([[3.0, 2.9, 1.0, -1.0]]).repeat(3, 1)
    penalised = SamplingParams(temperature=0.0, presence_penalty=0.5, logprobs=2)
    plain = SamplingParams(temperature=0.0)
    kept = logits.clone()
    tokens, logprobs = choose(
        kept,
        [plain, penalised, penalised],
        [None, history(([1], [0])), history(([0], [1]))],
    )
    assert tokens.tolist() == [0, 1, 0]
    assert torch.equal(kept, logits), "logits that logprobs are taken from are left alone"
    expected = logits[0].log_softmax(-1).tolist()
    assert set(logprobs) == {1, 2}
    assert logprobs[1].rank == 2
    assert logprobs[1].logprob == pytest.approx(expected[1])
    assert [token for token, _ in logprobs[1].top] == [0, 1]
    assert logprobs[2].rank == 1


def test_half_precision_logits_are_penalised_in_float32():
    logits = torch.tensor([[3.0, 2.9, 1.0]], dtype=torch.bfloat16)
    params = [SamplingParams(temperature=0.0, repetition_penalty=1.2)]
    tokens, _ = choose(logits, params, [history(([0], []))])
    assert tokens.tolist() == [1]


def test_each_row_reports_as_many_logprobs_as_it_asked_for():
    torch.manual_seed(0)
    logits = torch.randn(4, 30)
    params = [SamplingParams(temperature=0.0, logprobs=top) for top in (None, 0, 3, 99)]
    _, logprobs = choose(logits, params)
    assert {row: len(found.top) for row, found in logprobs.items()} == {1: 0, 2: 3, 3: 30}
    top = logits[2].log_softmax(-1).topk(3)
    assert [token for token, _ in logprobs[2].top] == top.indices.tolist()
    assert [value for _, value in logprobs[2].top] == pytest.approx(top.values.tolist())
