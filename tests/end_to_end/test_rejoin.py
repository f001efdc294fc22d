"""Streams between router and workers that break and come back: answers exact, nothing left behind."""

import asyncio

import pytest
from local_stack import local_stack
from tiny_models import random_prompt, reference_generate, tiny_model

NEW_TOKENS = 40
SETTINGS = {"max_batch_tokens": 32, "num_blocks": 80}


async def _until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("transport", ["inproc", "ucx"])
@pytest.mark.parametrize("lost", [("prefill-0",), ("decode-0",), ("prefill-0", "decode-0")])
async def test_a_stream_that_breaks_in_mid_work_costs_no_token_and_no_block(transport, lost):
    model = tiny_model("llama3")
    prompts = [random_prompt(90 + n, seed=n) for n in range(12)]
    expected = await asyncio.to_thread(reference_generate, model, prompts, NEW_TOKENS)
    async with local_stack(
        model,
        transport=transport,
        prefill_settings=SETTINGS,
        decode_settings=SETTINGS,
        max_replays=10,
    ) as stack:
        registry = stack.core.registry
        running = [asyncio.create_task(stack.answer(p, NEW_TOKENS)) for p in prompts]
        for _ in range(3):
            await _until(lambda: {"prefill-0", "decode-0"} <= {k.name for k in registry.links})
            await _until(
                lambda: (
                    any(k.load.running for k in registry.links) or all(t.done() for t in running)
                ),
            )
            for name in lost:
                registry.lose(registry.get(name), "the test breaks its stream")
        answers = await asyncio.gather(*running)
        assert [a.tokens for a in answers] == expected
        await _until(lambda: len(registry.links) == 2)
        await stack.idle_pools()
        again = await stack.answer(prompts[0], NEW_TOKENS)
        assert again.tokens == expected[0]
        assert again.finished().stats.replays == 0


async def test_many_reservations_on_a_tiny_pool_with_one_staging_buffer_all_end_exactly():
    model = tiny_model("llama3")
    prompts = [random_prompt(20 + 3 * n, seed=n) for n in range(24)]
    expected = await asyncio.to_thread(reference_generate, model, prompts, NEW_TOKENS)
    settings = {"max_batch_tokens": 64, "num_blocks": 12, "staging_buffers": 1}
    async with local_stack(model, prefill_settings=settings, decode_settings=settings) as stack:
        answers = await asyncio.gather(*(stack.answer(p, NEW_TOKENS) for p in prompts))
        assert [a.tokens for a in answers] == expected
        assert all(a.finished().stats.replays == 0 for a in answers)
