"""Real workers that sleep between requests, and in the middle of a crowd of them: no answer changes, none is lost."""

import asyncio
import random

import pytest
from local_stack import Stack, local_stack
from tiny_models import random_prompt, reference_generate, tiny_model

from kvrelay_router.fleet.slumber import Rest
from kvrelay_router.requests.types import PathKind

NEW_TOKENS = 8


async def expected(prompts):
    return await asyncio.to_thread(reference_generate, tiny_model("llama3"), prompts, NEW_TOKENS)


async def all_asleep(stack: Stack) -> None:
    registry = stack.core.registry
    async with asyncio.timeout(60):
        while any(link.slumber.rest is not Rest.ASLEEP for link in registry.links):
            for link in registry.links:
                registry.sleep(link)
            await asyncio.sleep(0.01)


def wake_all(stack: Stack) -> None:
    for link in stack.core.registry.links:
        stack.core.registry.wake(link)


@pytest.mark.parametrize("transport", ["inproc", "ucx"])
async def test_both_pools_forget_their_prefixes_and_answer_as_before(transport):
    prompt = random_prompt(70)
    (tokens,) = await expected([prompt])
    async with local_stack(tiny_model("llama3"), transport=transport) as stack:
        for _ in range(2):
            first, cached = [
                await stack.answer(prompt, NEW_TOKENS, path=PathKind.DISAGGREGATED)
                for _ in range(2)
            ]
            assert first.tokens == cached.tokens == tokens
            stats = first.finished().stats, cached.finished().stats
            assert (stats[0].cached_tokens, stats[1].cached_tokens > 0) == (0, True)
            assert stats[0].kv_bytes > stats[1].kv_bytes  # what the decode worker had was not sent
            await all_asleep(stack)
            for worker in stack.workers.values():
                counts = worker.engine.allocator.counts
                assert counts.free == counts.total
                assert worker.engine.runner.asleep
            wake_all(stack)


async def test_orders_to_sleep_in_the_middle_of_work_cost_no_request_its_answer():
    prompts = [random_prompt(20 + 9 * n, seed=n) for n in range(12)]
    answers = await expected(prompts)
    async with local_stack(tiny_model("llama3"), decode=2) as stack:
        registry, whims = stack.core.registry, random.Random(7)
        orders = 0

        async def toss_and_turn() -> None:
            nonlocal orders
            while True:
                link = whims.choice(registry.links)
                whims.choice((registry.sleep, registry.sleep, registry.wake))(link)
                orders = sum(k.slumber._order for k in registry.links)
                await asyncio.sleep(whims.choice((0.0, 0.001, 0.01)))

        tossing = asyncio.create_task(toss_and_turn())
        found = []
        rounds = 0
        while rounds < 3 or orders <= 10:  # how many come in a round depends on how long it takes
            found += await asyncio.gather(*(stack.answer(p, NEW_TOKENS) for p in prompts))
            rounds += 1
            assert not tossing.done()
        tossing.cancel()
        await asyncio.gather(tossing, return_exceptions=True)
        assert [answer.tokens for answer in found] == answers * rounds
        assert all(answer.finished().stats.replays == 0 for answer in found)
        wake_all(stack)
        again = await asyncio.gather(*(stack.answer(p, NEW_TOKENS) for p in prompts))
        assert [answer.tokens for answer in again] == answers
