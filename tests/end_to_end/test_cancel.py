"""Cancelled streams leave nothing behind and disturb nobody."""

import asyncio
import random
from pathlib import Path

import pytest
from local_stack import Answer, Stack, local_stack
from tiny_models import random_prompt, reference_generate, tiny_model

from kvrelay_protocol.errors import ClientGone, DeadlineExceeded
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_router.requests.types import Failed, Finished, PathKind, Tokens

STREAMS = 64
NEW_TOKENS = 24
LONG = 19_000
"""Tokens of an answer that no machine finishes before what ends it."""


def long_model() -> Path:
    return tiny_model("llama3", max_position_embeddings=LONG + 1000)


async def _cancel_at_once(stack: Stack, prompt: list[int]) -> Answer:
    """Walk away before anything can have come; the workers have the request already."""
    stream = stack.submit(prompt, NEW_TOKENS)
    stream.cancel("test")
    return Answer([event async for event in stream])


async def _cancel_after(stack: Stack, prompt: list[int], seconds: float) -> Answer:
    """Let a stream run for a while, however far it comes, then walk away from it."""
    stream = stack.submit(prompt, NEW_TOKENS)
    asyncio.get_running_loop().call_later(seconds, stream.cancel, "test")
    return Answer([event async for event in stream])


async def _cancel_at_token(stack: Stack, prompt: list[int], tokens: int) -> Answer:
    """Walk away once that many tokens are here."""
    stream = stack.submit(prompt, NEW_TOKENS)
    answer = Answer()
    async for event in stream:
        answer.events.append(event)
        if len(answer.tokens) >= tokens:
            stream.cancel("test")
    return answer


@pytest.mark.parametrize("transport", ["inproc", "ucx"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_half_of_64_streams_cancelled_at_random_points(transport, seed):
    rng = random.Random(seed)
    model = tiny_model("llama3")
    prompts = [random_prompt(rng.choice([3, 17, 60, 130, 300]), seed=n) for n in range(STREAMS)]
    kept = prompts[: STREAMS // 2]
    expected = await asyncio.to_thread(reference_generate, model, kept, NEW_TOKENS)
    async with local_stack(
        model,
        transport=transport,
        prefill_settings={"max_batch_tokens": 128, "num_blocks": 160},
        decode_settings={"max_batch_tokens": 128, "num_blocks": 160},
    ) as stack:
        work = [(stack.answer(p, NEW_TOKENS), e) for p, e in zip(kept, expected, strict=True)]
        at_once = 0
        for n, prompt in enumerate(prompts[STREAMS // 2 :]):
            # From "not even submitted to a worker" over "mid-transfer" to "almost done".
            if n % 3 == 0:
                cancelled = _cancel_at_once(stack, prompt)
                at_once += 1
            elif n % 3 == 1:
                cancelled = _cancel_after(stack, prompt, rng.random() * 1.5)
            else:
                cancelled = _cancel_at_token(stack, prompt, rng.randrange(NEW_TOKENS))
            work.insert(rng.randrange(len(work)), (cancelled, None))
        answers = await asyncio.gather(*(answer for answer, _ in work))
        for answer, (_, exact) in zip(answers, work, strict=True):
            if exact is not None:
                assert answer.finished()
                assert answer.tokens == exact
        for answer in answers:
            if isinstance(answer.end, Failed):
                assert isinstance(answer.end.error, ClientGone)
        # How many of the others come in time is the machine's affair.
        assert sum(isinstance(a.end, Failed) for a in answers) >= at_once
        for worker in await stack.idle_pools():
            assert worker.free_blocks + worker.cached_blocks == worker.total_blocks
            assert (worker.running, worker.waiting) == (0, 0)


async def test_a_deadline_ends_the_stream_in_a_typed_error_and_frees_both_pools():
    async with local_stack(long_model()) as stack:
        answer = await stack.answer(random_prompt(40), LONG, deadline_s=0.3)
        assert isinstance(answer.end, Failed)
        assert isinstance(answer.end.error, DeadlineExceeded)
        await stack.idle_pools()


async def test_stopping_early_is_a_normal_end():
    async with local_stack(long_model()) as stack:
        stream = stack.submit(random_prompt(40), LONG)
        events = []
        async for event in stream:
            events.append(event)
            if isinstance(event, Tokens):
                stream.stop_early()
        assert isinstance(events[-1], Finished)
        assert events[-1].reason == "stop"
        await stack.idle_pools()


@pytest.mark.parametrize("max_tokens", [1, 2])
async def test_the_shortest_answers(max_tokens):
    model, prompt = tiny_model("llama3"), random_prompt(33)
    (expected,) = reference_generate(model, [prompt], max_tokens)
    async with local_stack(model) as stack:
        for path in PathKind:
            answer = await stack.answer(prompt, max_tokens, path=path)
            assert answer.tokens == expected
            assert answer.finished().stats.completion_tokens == max_tokens


async def test_a_stop_token_ends_the_answer_on_either_worker():
    model, prompt = tiny_model("llama3"), random_prompt(33)
    (expected,) = reference_generate(model, [prompt], 12)
    async with local_stack(model) as stack:
        for path in PathKind:
            for position in (0, 5):
                stop = expected[position]
                cut = expected[: expected.index(stop) + 1]
                answer = await stack.answer(prompt, 12, path=path, stop=frozenset({stop}))
                assert answer.tokens == cut
                assert answer.finished().reason == "stop"


async def test_a_seeded_draw_does_not_depend_on_path_batch_or_cache():
    prompt = random_prompt(50)
    sampling = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=7)
    async with local_stack(tiny_model("llama3")) as stack:
        alone = await stack.answer(prompt, 20, sampling=sampling, path=PathKind.LOCAL, salt=b"a")
        crowd = await asyncio.gather(
            *(stack.answer(random_prompt(30, seed=n), 20) for n in range(8)),
            stack.answer(prompt, 20, sampling=sampling),
            stack.answer(prompt, 20, sampling=sampling, path=PathKind.LOCAL),
        )
        assert crowd[-2].tokens == alone.tokens == crowd[-1].tokens
        other = await stack.answer(prompt, 20, sampling=SamplingParams(temperature=0.9, seed=8))
        assert other.tokens != alone.tokens
