"""Sampling in Triton against the torch reference, token by token and bit by bit.

On a GPU the kernels run compiled, elsewhere in Triton's interpreter, with smaller tiles there.
"""

import pytest
import torch

from kvrelay_engine.sampler.philox import uniforms as host_uniforms
from kvrelay_kernels.cuda import sampling_draw, sampling_tiles
from kvrelay_kernels.cuda.sampling_draw import sample_cuda, uniforms_cuda
from kvrelay_kernels.cuda.sampling_greedy import greedy_cuda
from kvrelay_kernels.cuda.sampling_logprobs import token_logprobs_cuda
from kvrelay_kernels.cuda.sampling_penalties import apply_penalties_cuda
from kvrelay_kernels.cuda.sampling_weights import integer_weights_cuda
from kvrelay_kernels.reference.sampling import (
    apply_penalties_reference,
    greedy_reference,
    integer_weights,
    sample_reference,
    token_logprobs_reference,
    uniforms_reference,
)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
VOCABULARY = 50_021 if ON_GPU else 149


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(sampling_tiles, "TILE", 32)


def case(rows, *, scale=2.0, dtype=torch.float32, vocabulary=VOCABULARY, seed=0):
    """Logits, and parameters that differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, generator=generator) * scale).to(dtype)

    def pick(*values):
        return torch.tensor(values)[torch.randint(0, len(values), (rows,), generator=generator)]

    given = {
        "temperature": pick(0.2, 0.7, 1.0, 2.0).double(),
        "top_k": pick(0, 1, 2, 40, vocabulary - 1, vocabulary, 1 << 20),
        "top_p": pick(1e-9, 0.5, 0.9, 0.9999, 1.0).double(),
        "min_p": pick(0.0, 0.0, 0.05, 1.0).double(),
        "uniform": torch.rand(rows, generator=generator, dtype=torch.float64),
    }
    return logits.to(DEVICE), {name: value.to(DEVICE) for name, value in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_equal_the_reference_bit_by_bit(dtype):
    logits, given = case(3, scale=5.0, dtype=dtype)
    logits[:, ::5] = float("-inf")
    weights, tile_sum, tile_top = integer_weights_cuda(logits, given["temperature"])
    expected = integer_weights(logits.cpu(), given["temperature"].cpu())
    assert torch.equal(weights.cpu(), expected)
    tiles = expected.split(sampling_tiles.TILE, dim=1)
    assert torch.equal(tile_sum.cpu(), torch.stack([tile.sum(1) for tile in tiles], 1))
    assert torch.equal(tile_top.cpu(), torch.stack([tile.amax(1) for tile in tiles], 1))


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_tokens_equal_the_reference_with_other_parameters_in_every_row(scale):
    logits, given = case(200 if ON_GPU else 8, scale=scale)
    expected = sample_reference(logits.cpu(), **{k: v.cpu() for k, v in given.items()})
    assert sample_cuda(logits, **given).tolist() == expected.tolist()


def test_equal_weights_share_their_fate():
    """Many ties at the threshold, and fewer tokens with any weight than top-k asks for."""
    logits, given = case(6, vocabulary=70)
    logits = logits.round()
    logits[:, 10:] = float("-inf")
    given["top_k"] = torch.tensor([3, 5, 9, 20, 69, 2], device=DEVICE)
    expected = sample_reference(logits.cpu(), **{k: v.cpu() for k, v in given.items()})
    assert sample_cuda(logits, **given).tolist() == expected.tolist()


def test_rows_are_drawn_in_groups_and_may_lie_apart(monkeypatch):
    logits, given = case(5)
    wide = torch.zeros(5, VOCABULARY + 9, device=DEVICE)
    wide[:, 4 : 4 + VOCABULARY] = logits
    expected = sample_reference(logits.cpu(), **{k: v.cpu() for k, v in given.items()})
    monkeypatch.setattr(sampling_draw, "SCRATCH_BYTES", 2 * 8 * VOCABULARY)
    drawn = sample_cuda(wide[:, 4 : 4 + VOCABULARY], **given)
    assert drawn.tolist() == expected.tolist()


def test_greedy_takes_the_lowest_of_equals():
    logits, _ = case(4)
    logits[0] = 0.0
    logits[1, [33, 64, 140]] = 99.0
    logits[2] = float("-inf")
    logits[2, -1] = -5.0
    expected = greedy_reference(logits.cpu()).tolist()
    assert expected[:3] == [0, 33, VOCABULARY - 1]
    assert greedy_cuda(logits).tolist() == expected


def test_uniforms_equal_those_of_the_host():
    seeds = [0, 1, 5, 2**64 - 1, 2**63, 2**40 + 7]
    positions = [0, 3, 2**31, 2**33 + 1, 17, 1]
    bits = torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds], device=DEVICE)
    at = torch.tensor(positions, device=DEVICE)
    expected = host_uniforms(seeds, positions).tolist()
    assert uniforms_cuda(bits, at).tolist() == expected
    assert uniforms_reference(bits, at).tolist() == expected


def test_penalties_equal_the_reference():
    logits, _ = case(3)
    pairs = 40
    chosen = torch.randperm(3 * VOCABULARY, generator=torch.Generator().manual_seed(1))[:pairs]
    given = {
        "token_ids": chosen % VOCABULARY,
        "pair_rows": chosen // VOCABULARY,
        "output_counts": torch.arange(pairs, dtype=torch.int32) % 4,
        "presence": torch.tensor([0.7, 0.0, -0.3]),
        "frequency": torch.tensor([0.1, 0.3, 0.0]),
        "repetition": torch.tensor([1.3, 1.0, 0.7]),
    }
    expected = logits.cpu().clone()
    apply_penalties_reference(expected, **given)
    apply_penalties_cuda(logits, **{name: value.to(DEVICE) for name, value in given.items()})
    assert torch.equal(logits.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_match_the_reference(dtype):
    logits, _ = case(4, dtype=dtype)
    logits[3, 1:] = float("-inf")
    tokens = torch.tensor([0, 148, 77, 0], device=DEVICE)
    found = token_logprobs_cuda(logits, tokens, 5)
    expected = token_logprobs_reference(logits.cpu(), tokens.cpu(), 5)
    assert found.rank.tolist() == expected.rank.tolist()
    assert found.top_ids.tolist() == expected.top_ids.tolist()
    torch.testing.assert_close(found.logprob.cpu(), expected.logprob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        found.top_logprobs.cpu(), expected.top_logprobs, atol=1e-5, rtol=1e-5
    )
