"""A model that computes nonsense costs the request concerned, never the worker or another request."""

import asyncio

import torch
from local_stack import local_stack
from tiny_models import random_prompt, reference_generate, tiny_model

from kvrelay_router.requests.types import Failed, PathKind

NEW_TOKENS = 8


async def test_a_prefix_that_yields_no_finite_logits_is_computed_elsewhere_and_forgotten():
    prompt = random_prompt(70)
    model = tiny_model("llama3")
    (expected,) = await asyncio.to_thread(reference_generate, model, [prompt], NEW_TOKENS)
    async with local_stack(model) as stack:
        await stack.answer(prompt, NEW_TOKENS, path=PathKind.DISAGGREGATED)
        await stack.idle_pools()
        stack.workers["prefill-0"].engine.runner.pool.tensor.fill_(torch.nan)
        saved = await stack.answer(prompt, NEW_TOKENS)
        assert saved.tokens == expected
        assert saved.finished().stats.replays == 1
        assert saved.finished().stats.path.kind is PathKind.LOCAL
        again = await stack.answer(prompt, NEW_TOKENS, path=PathKind.DISAGGREGATED)
        assert again.tokens == expected
        assert again.finished().stats.replays == 0


async def test_without_another_worker_it_is_a_typed_error_and_the_others_go_on():
    prompt, other = random_prompt(70), random_prompt(50, seed=2)
    model = tiny_model("llama3")
    (expected,) = await asyncio.to_thread(reference_generate, model, [other], NEW_TOKENS)
    async with local_stack(model, prefill=0) as stack:
        await stack.answer(prompt, NEW_TOKENS)
        await stack.idle_pools()
        stack.workers["decode-0"].engine.runner.pool.tensor.fill_(torch.nan)
        broken, whole = await asyncio.gather(
            stack.answer(prompt, NEW_TOKENS), stack.answer(other, NEW_TOKENS)
        )
        assert isinstance(broken.end, Failed)
        assert broken.end.error.code == "internal_error"
        assert whole.tokens == expected
