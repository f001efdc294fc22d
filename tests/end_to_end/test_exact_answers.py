"""Greedy answers through both pools equal those of transformers, token for token, in float32."""

import asyncio

import pytest
from local_stack import Stack, local_stack
from tiny_models import FAMILIES, random_prompt, reference_generate, tiny_model

from kvrelay_router.requests.types import PathKind

NEW_TOKENS = 8
# Every short length, both sides of block (16) and chunk (64) edges, and long prompts.
LENGTHS = sorted(
    {*range(1, 52), *(16 * k + d for k in range(4, 20) for d in (-1, 0, 1))}
    | {*(64 * k + d for k in range(5, 9) for d in (-1, 0, 1)), 599, 600},
)
CHUNK = {"max_batch_tokens": 64}


def _prompts(seed: int) -> list[list[int]]:
    return [random_prompt(length, seed=seed + length) for length in LENGTHS]


async def _answers(stack: Stack, prompts: list[list[int]], path: PathKind) -> list[list[int]]:
    answers = await asyncio.gather(*(stack.answer(p, NEW_TOKENS, path=path) for p in prompts))
    for answer in answers:
        assert answer.finished().stats.path.kind is path
    return [answer.tokens for answer in answers]


def test_enough_prompts():
    assert len(LENGTHS) >= 100


@pytest.mark.parametrize("family", FAMILIES)
async def test_disaggregated_cached_and_local_answers_are_exact(family):
    model, prompts = tiny_model(family), _prompts(seed=1000)
    expected = await asyncio.to_thread(reference_generate, model, prompts, NEW_TOKENS)
    settings = CHUNK | {"kv_memory_bytes": 64 * 2**20}
    async with local_stack(
        model,
        transport="ucx",
        prefill_settings=settings,
        decode_settings=settings,
    ) as stack:
        assert await _answers(stack, prompts, PathKind.DISAGGREGATED) == expected
        again = await _answers(stack, prompts[60:], PathKind.DISAGGREGATED)
        assert again == expected[60:]
        warm = await stack.answer(prompts[-1], NEW_TOKENS, path=PathKind.DISAGGREGATED)
        assert warm.finished().stats.cached_tokens == (len(prompts[-1]) - 1) // 16 * 16
        # A tenant of its own shares no cached block: these prompts are computed here, from nothing.
        local = await asyncio.gather(
            *(stack.answer(p, NEW_TOKENS, path=PathKind.LOCAL, salt=b"other") for p in prompts),
        )
        assert [a.tokens for a in local] == expected


@pytest.mark.parametrize("path", [PathKind.DISAGGREGATED, PathKind.LOCAL])
@pytest.mark.parametrize("family", FAMILIES)
async def test_answers_are_exact_under_preemption(family, path):
    model = tiny_model(family)
    prompts = [random_prompt(20 + n, seed=n) for n in range(12)]
    expected = await asyncio.to_thread(reference_generate, model, prompts, 60)
    async with local_stack(
        model,
        prefill_settings=CHUNK,
        decode_settings=CHUNK | {"num_blocks": 20},
    ) as stack:
        answers = await asyncio.gather(*(stack.answer(p, 60, path=path) for p in prompts))
        assert [a.tokens for a in answers] == expected
        # In a report of its own; a pool of 20 blocks can't hold two thirds of them to their end.
        async with asyncio.timeout(60):
            while not any(link.load.preemptions for link in stack.core.registry.links):
                await asyncio.sleep(0.02)
