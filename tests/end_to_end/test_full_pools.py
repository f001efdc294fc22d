"""A decode pool with room for half of its load: what is let in ends exactly, the rest is told at once."""

import asyncio

import pytest
from local_stack import local_stack
from tiny_models import random_prompt, tiny_model

from kvrelay_protocol.errors import QueueFull
from kvrelay_router.requests.types import PathKind

BLOCK = 16
NEW_TOKENS = 60
PROMPTS = [random_prompt(length, seed=n) for n, length in enumerate([20, 25, 250, 30, 40, 270] * 6)]
"""Short ones and long ones; a long one alone takes more than half of the pool."""
BLOCKS = 24
MAX_QUEUE = 10


@pytest.mark.parametrize("path", list(PathKind))
async def test_a_pool_that_is_too_small_ends_in_answers_and_429_not_in_a_livelock(path):
    model = tiny_model("llama3")
    settings = {"max_batch_tokens": 64}
    async with local_stack(
        model,
        prefill_settings=settings,
        decode_settings=settings | {"num_blocks": BLOCKS},
        max_queue=MAX_QUEUE,
    ) as stack:
        alone = {}
        for n, prompt in enumerate(PROMPTS):
            answer = await stack.answer(prompt, NEW_TOKENS, path=path, salt=b"first")
            alone[n] = answer.tokens
        before = _preemptions(stack)
        streams, refused = {}, []
        for n, prompt in enumerate(PROMPTS):
            try:
                streams[n] = stack.submit(prompt, NEW_TOKENS, path=path)
            except QueueFull as error:
                refused.append(error)
        assert refused, "the line is bounded"
        assert len(streams) > MAX_QUEUE, "and not everybody stands in it"
        for error in refused:
            assert error.http_status == 429
            assert error.retry_after_s >= 1

        async def tokens(n: int) -> tuple[int, list[int]]:
            return n, [t for e in [e async for e in streams[n]] for t in getattr(e, "ids", ())]

        for n, got in await asyncio.gather(*map(tokens, streams)):
            assert got == alone[n]
        await stack.idle_pools()
        # A preemption makes room for one block of a sequence that goes on.
        growth = len(streams) * (-(-NEW_TOKENS // BLOCK) + 1)
        assert _preemptions(stack) - before <= growth
        if path is PathKind.LOCAL:  # all at one worker, so at once
            async with asyncio.timeout(60):
                while _preemptions(stack) == before:
                    await asyncio.sleep(0.05)


def _preemptions(stack) -> int:
    return sum(link.load.preemptions for link in stack.core.registry.links)
