"""Whole steps on a GPU: the tokens of transformers, whatever the batch, and the draws of the CPU."""

import pytest
import torch
from tiny_models import FAMILIES, clear_case, tiny_model

from kvrelay_engine.batch import Batch, SequenceSlice
from kvrelay_engine.loading import load_engine
from kvrelay_protocol.sampling import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
BLOCK = 16
NEW_TOKENS = 6
GREEDY = SamplingParams(temperature=0.0)
LENGTHS = (1, 15, 16, 17, 33, 64, 100, 257, 500)


def answers(runner, prompts, new_tokens, *, chunk, sampling=GREEDY):
    """Tokens of every prompt, all in one batch, prompts in chunks beside the others' decode steps."""
    known = [list(prompt) for prompt in prompts]
    width = -(-(max(map(len, prompts)) + new_tokens) // BLOCK)
    tables = [tuple(range(i * width, (i + 1) * width)) for i in range(len(prompts))]
    computed = [0] * len(prompts)
    while True:
        slices = []
        for i, tokens in enumerate(known):
            if len(tokens) - len(prompts[i]) == new_tokens:
                continue
            part = tuple(tokens[computed[i] : computed[i] + chunk])
            last = computed[i] + len(part) == len(tokens)
            slices.append(
                SequenceSlice(i, part, computed[i], tables[i], sampling if last else None)
            )
        if not slices:
            return [t[len(p) :] for t, p in zip(known, prompts, strict=True)]
        result = runner.step(Batch(tuple(slices)))
        assert not result.errors
        for part in slices:
            computed[part.sequence_id] += len(part.tokens)
        for number, token in result.tokens.items():
            known[number].append(token)


def load(family, device, dtype="float32"):
    return load_engine(
        tiny_model(family), device=device, dtype=dtype, num_blocks=320, block_size=BLOCK
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family):
    cases = [clear_case(tiny_model(family), length, NEW_TOKENS) for length in LENGTHS]
    prompts, expected = [case[0] for case in cases], [list(case[1]) for case in cases]
    runner = load(family, "cuda")
    assert answers(runner, prompts, NEW_TOKENS, chunk=1000) == expected
    assert answers(runner, prompts, NEW_TOKENS, chunk=48) == expected


def test_drawn_tokens_are_those_of_the_cpu():
    prompts = [clear_case(tiny_model("llama3"), length, NEW_TOKENS)[0] for length in LENGTHS]
    sampling = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=11)
    found = [
        answers(load("llama3", device), prompts, 3, chunk=1000, sampling=sampling)
        for device in ("cpu", "cuda")
    ]
    # The draw is exact, the logits are not: a number at the edge of two tokens may fall to either.
    pairs = [pair for cpu, gpu in zip(*found, strict=True) for pair in zip(cpu, gpu, strict=True)]
    assert sum(a == b for a, b in pairs) >= 0.9 * len(pairs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_steps_give_every_sequence_a_token(dtype):
    prompts = [clear_case(tiny_model("qwen3"), length, NEW_TOKENS)[0] for length in LENGTHS]
    tokens = answers(load("qwen3", "cuda", dtype), prompts, NEW_TOKENS, chunk=48)
    assert [len(row) for row in tokens] == [NEW_TOKENS] * len(LENGTHS)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_sleep_frees_the_device_and_waking_changes_no_token(quantization):
    torch.cuda.empty_cache()
    nothing = torch.cuda.memory_allocated()
    runner = load_engine(
        tiny_model("llama3"), device="cuda", dtype="float32", num_blocks=320, block_size=BLOCK,
        max_step_tokens=64, quantization=quantization,
    )  # fmt: skip
    prompts = [clear_case(tiny_model("llama3"), length, NEW_TOKENS)[0] for length in LENGTHS]
    before = answers(runner, prompts, NEW_TOKENS, chunk=48)
    awake = torch.cuda.memory_allocated()
    runner.sleep()
    # Work areas of the vendor's library are not the model's.
    assert torch.cuda.memory_allocated() - nothing < (awake - nothing) / 2
    runner.wake()
    assert answers(runner, prompts, NEW_TOKENS, chunk=48) == before
