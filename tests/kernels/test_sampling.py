"""The draw against a plain Python oracle, its filters, its frequencies and its independence of batches."""

import math
from fractions import Fraction

import pytest
import torch

from kvrelay_engine.sampler.philox import uniforms as host_uniforms
from kvrelay_kernels import sampling as op
from kvrelay_kernels.cpu.library import cpu_library
from kvrelay_kernels.reference import sampling as reference
from kvrelay_kernels.reference.sampling import (
    greedy_reference,
    integer_weights,
    sample_reference,
)


def params(rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5):
    def column(value):
        return torch.as_tensor(value, dtype=torch.float64).expand(rows).clone()

    return {
        "temperature": column(temperature),
        "top_k": torch.as_tensor(top_k).expand(rows).clone(),
        "top_p": column(top_p),
        "min_p": column(min_p),
        "uniform": column(uniform),
    }


def oracle(logits, temperature, top_k, top_p, min_p, uniform):
    """The module's definition with Python integers and fractions."""
    top = max(logits)
    weights = [int(math.exp((x - top) / temperature) * 2**40) for x in logits]
    if 0 < top_k < len(weights):
        limit = sorted(weights, reverse=True)[top_k - 1]
        weights = [w if w >= limit else 0 for w in weights]
    if top_p < 1:
        limit = max(
            t
            for t in weights
            if sum(w for w in weights if w >= t) >= Fraction(top_p) * sum(weights)
        )
        weights = [w if w >= limit else 0 for w in weights]
    weights = [w if w >= min_p * 2**40 else 0 for w in weights]
    target, running = int(uniform * sum(weights)), 0
    for token, weight in enumerate(weights):
        running += weight
        if running > target:
            return token
    raise AssertionError("no token reached the target")


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, 5.0], [-2.0, -1.0, -3.0]])
    assert op.greedy(logits).tolist() == [1, 0, 1]


def mixed_case(rows, vocabulary, scale, seed=1):
    """Logits, and parameters that differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * scale

    def pick(*values):
        index = torch.randint(0, len(values), (rows,), generator=generator)
        return torch.tensor(values)[index]

    given = {
        "temperature": pick(0.2, 0.7, 1.0, 2.0).double(),
        "top_k": pick(0, 1, 2, 5, vocabulary - 1, vocabulary, 1 << 20),
        "top_p": pick(0.05, 0.5, 0.9, 0.999, 1.0).double(),
        "min_p": pick(0.0, 0.05, 0.5, 1.0).double(),
        "uniform": torch.rand(rows, generator=generator, dtype=torch.float64),
    }
    return logits, given


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("draw", [op.sample, sample_reference], ids=["op", "reference"])
@pytest.mark.parametrize("candidates", [1, 3, 256])
def test_matches_the_oracle_with_other_parameters_in_every_row(
    scale, draw, candidates, monkeypatch
):
    monkeypatch.setattr(reference, "_CANDIDATES", candidates)
    logits, given = mixed_case(200, 37, scale)
    drawn = draw(logits, **given).tolist()
    expected = [
        oracle(row.tolist(), *(given[name][index].item() for name in given))
        for index, row in enumerate(logits.double())
    ]
    assert drawn == expected


def test_a_row_is_the_same_alone_and_in_any_batch(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(9, 1003, generator=generator) * 2
    given = params(9, temperature=0.8, top_p=0.95, uniform=torch.rand(9, generator=generator))
    given["top_k"] = torch.tensor([0, 50, 0, 1, 300, 0, 7, 0, 999])
    together = op.sample(logits, **given)
    backwards = op.sample(logits.flip(0), **{k: v.flip(0) for k, v in given.items()}).flip(0)
    alone = [
        op.sample(logits[i : i + 1], **{k: v[i : i + 1] for k, v in given.items()}).item()
        for i in range(9)
    ]
    monkeypatch.setattr(reference, "_CPU_GROUP_BYTES", 1)
    grouped = sample_reference(logits, **given)
    assert together.tolist() == backwards.tolist() == alone == grouped.tolist()


@pytest.mark.skipif(cpu_library() is None, reason="no C++ compiler")
def test_the_compiled_kernel_and_torch_agree_on_every_bit():
    from kvrelay_kernels.cpu.sampling import integer_weights_cpu

    for scale in (0.01, 1.0, 30.0):
        logits, given = mixed_case(24, 20_011, scale, seed=3)
        logits[:, ::7] = float("-inf")
        weights = integer_weights(logits, given["temperature"])
        native = integer_weights_cpu(cpu_library(), logits, given["temperature"])
        assert torch.equal(native, weights)
        assert op.sample(logits, **given).tolist() == sample_reference(logits, **given).tolist()


def test_weights_are_within_one_unit_of_the_formula():
    exponents = torch.cat([torch.linspace(0, -40, 20_001), torch.tensor([float("-inf")])])
    weights = integer_weights(exponents.unsqueeze(0), torch.ones(1).double())[0].tolist()
    for exponent, weight in zip(exponents.tolist(), weights, strict=True):
        assert abs(weight - math.exp(exponent) * 2**40) <= 1.001
    assert weights[0] == 2**40
    assert weights[-1] == 0


def test_rows_may_be_a_view():
    logits, given = mixed_case(8, 64, 2.0)
    wide = torch.randn(8, 100)
    wide[:, 17:81] = logits
    expected = op.sample(logits, **given)
    assert torch.equal(op.sample(wide[:, 17:81], **given), expected)
    transposed = logits.T.contiguous().T
    assert torch.equal(op.sample(transposed, **given), expected)


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -3.0])
    draws = 20_000
    # Evenly spaced numbers leave no sampling noise: every count is within one of its share.
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    given = params(draws, temperature=0.7)
    tokens = op.sample(logits.expand(draws, 5), **{**given, "uniform": uniform})
    shares = torch.bincount(tokens, minlength=5) / draws
    torch.testing.assert_close(shares, (logits / 0.7).softmax(0), atol=1.5 / draws, rtol=0)


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.5}, {3}),
        ({"top_p": 0.6}, {1, 3}),
        ({"min_p": 0.2}, {0, 1, 3}),
        ({"top_k": 3, "top_p": 0.95}, {0, 1, 3}),
        ({"top_p": 1e-9}, {3}),
        ({"min_p": 1.0}, {3}),
    ],
)
def test_filters_keep_the_most_likely(setting, kept):
    logits = torch.tensor([0.15, 0.25, 0.08, 0.52]).log()
    uniform = torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64)
    tokens = op.sample(logits.expand(500, 4), **params(500, uniform=uniform, **setting))
    assert set(tokens.tolist()) == kept


def test_excluded_tokens_are_never_drawn():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    for uniform in (0.0, 0.49, 0.5, 1 - 2**-53):
        expected = 1 if uniform < 0.5 else 3
        assert op.sample(logits, **params(1, uniform=uniform)).tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_of_logits_is_taken(dtype):
    logits = torch.tensor([[0.0, 8.0, 0.0]], dtype=dtype)
    assert op.sample(logits, **params(1)).tolist() == [1]
    assert op.greedy(logits).tolist() == [1]


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 300, 5003])
def test_greedy_matches_the_reference(vocabulary):
    logits = torch.randn(9, vocabulary)
    logits[2] = logits[2].round()  # many equals
    logits[3], logits[4] = float("-inf"), 0.0
    logits[5, vocabulary // 2 :] = 7.0
    expected = greedy_reference(logits)
    assert torch.equal(op.greedy(logits), expected)
    wide = torch.full((9, vocabulary + 5), 100.0)
    wide[:, 2 : 2 + vocabulary] = logits
    assert torch.equal(op.greedy(wide[:, 2 : 2 + vocabulary]), expected)


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([[1.0, 1.001, 0.5]])
    for uniform in (0.0, 0.999999):
        assert op.sample(logits, **params(1, temperature=1e-6, uniform=uniform)).tolist() == [1]


def test_a_large_vocabulary_does_not_overflow():
    vocabulary = 1 << 18
    logits = torch.zeros(1, vocabulary)
    given = params(1, uniform=1 - 2**-53)
    assert op.sample(logits, **given).tolist() == [vocabulary - 1]


def test_uniforms_equal_those_of_the_host():
    seeds = [0, 1, 5, 2**64 - 1, 2**63, 2**40 + 7]
    positions = [0, 3, 2**31, 2**33 + 1, 17, 1]
    bits = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
    drawn = op.uniforms(torch.tensor(bits), torch.tensor(positions))
    assert drawn.dtype == torch.float64
    assert drawn.tolist() == host_uniforms(seeds, positions).tolist()


def penalty_case():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
    given = {
        "token_ids": torch.tensor([0, 1, 3, 2]),
        "pair_rows": torch.tensor([0, 0, 0, 1]),
        "output_counts": torch.tensor([0, 3, 1, 2], dtype=torch.int32),
        "presence": torch.tensor([0.5, 0.0]),
        "frequency": torch.tensor([0.25, 1.0]),
        "repetition": torch.tensor([2.0, 1.0]),
    }
    return logits, given


def test_penalties_follow_their_formulas():
    logits, given = penalty_case()
    assert op.apply_penalties(logits, **given) is None
    # Repetition on what prompt and output hold, the others on what the output holds.
    assert logits.tolist() == [
        [2.0 / 2, -2.0 * 2 - 3 * 0.25 - 0.5, 1.0, 0.5 / 2 - 0.25 - 0.5],
        [1.0, 1.0, 1.0 - 2.0, 1.0],
    ]


def test_logprobs_are_those_of_the_softmax_and_ties_go_by_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0, 3.0], [0.0, -0.0, -5.0, -7.0, -6.0]])
    found = op.token_logprobs(logits, torch.tensor([0, 3]), 4)
    expected = logits.double().log_softmax(-1)
    assert found.rank.tolist() == [4, 5]
    assert found.top_ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 4]]
    chosen = torch.stack([expected[0, 0], expected[1, 3]])
    torch.testing.assert_close(found.logprob.double(), chosen)
    torch.testing.assert_close(found.top_logprobs.double(), expected.gather(1, found.top_ids))
    assert op.token_logprobs(logits, torch.tensor([0, 3]), 0).top_ids.shape == (2, 0)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="positions has shape"):
        op.uniforms(torch.zeros(2).long(), torch.zeros(1).long())
    logits, given = penalty_case()
    with pytest.raises(ValueError, match="output_counts has dtype"):
        op.apply_penalties(logits, **{**given, "output_counts": torch.zeros(4).long()})
    with pytest.raises(ValueError, match="top is 5, expected 0 to 4"):
        op.token_logprobs(logits, torch.tensor([0, 1]), 5)
    with pytest.raises(ValueError, match="logits has dtype"):
        op.sample(torch.zeros(1, 3).double(), **params(1))
    with pytest.raises(ValueError, match="temperature has shape"):
        op.sample(torch.zeros(2, 3), **params(1))
    with pytest.raises(ValueError, match="top_k has dtype"):
        op.sample(torch.zeros(1, 3), **{**params(1), "top_k": torch.ones(1)})
    with pytest.raises(ValueError, match="vocabulary"):
        op.sample(torch.zeros(1, 1).expand(1, (1 << 22) + 1), **params(1))
