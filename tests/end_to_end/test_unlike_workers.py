"""Prefill and decode workers that differ in block size or dtype, in whole stacks over real transport.

Promised: exact answers where the dtypes are equal, whatever the block sizes. Where they differ the KV is
rounded to the decode worker's dtype, once; answers are then those of neither worker alone, but the same
every time on the same path.
"""

import asyncio

import pytest
from local_stack import Stack, local_stack
from tiny_models import random_prompt, reference_generate, tiny_model

from kvrelay_router.requests.types import PathKind

NEW_TOKENS = 8
LENGTHS = [1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 161]
CHUNK = {"max_batch_tokens": 64}


def _prompts() -> list[list[int]]:
    # Of one seed per length; the longest two share a prefix, so that the caches have work.
    prompts = [random_prompt(length, seed=500 + length) for length in LENGTHS]
    return [*prompts, [*prompts[-1][:130], *random_prompt(37, seed=9)]]


async def _answers(stack: Stack, prompts: list[list[int]]) -> list[list[int]]:
    answers = await asyncio.gather(
        *(stack.answer(p, NEW_TOKENS, path=PathKind.DISAGGREGATED) for p in prompts)
    )
    assert all(a.finished().stats.path.kind is PathKind.DISAGGREGATED for a in answers)
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("sizes", [(16, 32), (32, 16), (16, 24), (8, 1)])
async def test_unequal_blocks_give_the_answers_of_transformers(sizes):
    model, prompts = tiny_model("llama3"), _prompts()
    expected = await asyncio.to_thread(reference_generate, model, prompts, NEW_TOKENS)
    async with local_stack(
        model,
        transport="ucx",
        prefill_settings=CHUNK | {"block_size": sizes[0]},
        decode_settings=CHUNK | {"block_size": sizes[1]},
    ) as stack:
        assert await _answers(stack, prompts) == expected
        # Again: now both sides have most of it cached, each up to a block of its own.
        assert await _answers(stack, prompts) == expected
        # The decode worker's own prefill continues from what it was sent.
        longer = [[*prompt, *random_prompt(20, seed=3)] for prompt in prompts]
        local = await asyncio.gather(
            *(stack.answer(p, NEW_TOKENS, path=PathKind.LOCAL) for p in longer)
        )
        again = await asyncio.to_thread(reference_generate, model, longer, NEW_TOKENS)
        assert [answer.tokens for answer in local] == again


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
async def test_unequal_dtypes_serve_the_same_answers_every_time(dtypes):
    model, prompts = tiny_model("llama3"), _prompts()
    seen = []
    # Sums of a step in bfloat16 may depend on the blocks; in float32 no choice here is that close.
    for decode_block in (16, 32 if dtypes[1] == "float32" else 16):
        async with local_stack(
            model,
            transport="ucx",
            prefill_settings=CHUNK | {"dtype": dtypes[0]},
            decode_settings=CHUNK | {"dtype": dtypes[1], "block_size": decode_block},
        ) as stack:
            # One at a time: in bfloat16 the company in a batch may move a sum's last bit.
            seen.append([(await _answers(stack, [prompt]))[0] for prompt in prompts])
            await stack.idle_pools()
    assert seen[0] == seen[1]
    assert all(len(tokens) == NEW_TOKENS for tokens in seen[0])
    if dtypes[0] == "float32":
        # The first token is the prefill worker's alone.
        expected = await asyncio.to_thread(reference_generate, model, prompts, 1)
        assert [tokens[:1] for tokens in seen[0]] == expected
