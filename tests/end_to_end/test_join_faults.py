"""Join streams that lose, repeat and swap messages, and two routers over the same workers: real workers,
real gRPC, exact answers, nothing left behind.
"""

import asyncio
import itertools
import random
import threading
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from local_stack import Stack, local_stack
from tiny_models import random_prompt, reference_generate, tiny_model

from kvrelay_protocol.outgoing import Outgoing
from kvrelay_router.requests.types import Failed, Finished

NEW_TOKENS = 30
SETTINGS = {"max_batch_tokens": 32, "num_blocks": 80}


async def _until(condition):
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.005)


class FaultyLines:
    """What leaves either end of any Join stream goes through here, already numbered."""

    def __init__(self, monkeypatch, *, seed: int, faults: int) -> None:
        self.done: Counter[str] = Counter()
        self._left = faults
        self._random = random.Random(seed)
        self._kinds = itertools.cycle(("dropped", "repeated", "swapped"))
        self._aside: dict[Outgoing, list] = defaultdict(list)
        self._next = Outgoing.next

        async def faulty(line: Outgoing) -> object:
            return await self._faulty(line)

        monkeypatch.setattr(Outgoing, "next", faulty)

    async def _faulty(self, line: Outgoing) -> object:
        aside = self._aside[line]
        if aside:
            return aside.pop()
        message = await self._next(line)
        if message is None or not self._left or self._random.random() > 0.04:
            return message
        self._left -= 1
        fault = next(self._kinds)
        self.done[fault] += 1
        if fault == "repeated":
            aside.append(type(message).FromString(message.SerializeToString()))
            return message
        following = await self._next(line)
        if fault == "swapped":
            aside.append(message)
        return following


@pytest.mark.parametrize("seed", [1, 2])
async def test_messages_lost_repeated_and_swapped_cost_no_token_and_no_block(seed, monkeypatch):
    model = tiny_model("llama3")
    prompts = [random_prompt(60 + n, seed=n) for n in range(10)]
    expected = await asyncio.to_thread(reference_generate, model, prompts, NEW_TOKENS)
    async with local_stack(
        model,
        decode=2,
        prefill_settings=SETTINGS,
        decode_settings=SETTINGS,
        max_replays=1000,
        replay_wait_s=120.0,
    ) as stack:
        metrics = stack.core.metrics.registry
        lines = FaultyLines(monkeypatch, seed=seed, faults=15)
        while lines._left:
            # An answer is a few messages only; more of them until there was one for every fault.
            answers = await asyncio.gather(
                *(stack.answer(prompt, NEW_TOKENS, deadline_s=240.0) for prompt in prompts)
            )
            assert [answer.tokens for answer in answers] == expected
        assert lines.done == {"dropped": 5, "repeated": 5, "swapped": 5}
        await _until(lambda: len(stack.core.registry.links) == 3)
        await stack.idle_pools(60.0)
        noticed = 0.0
        for way, kind in itertools.product(("up", "down"), ("missing", "repeated")):
            labels = {"direction": way, "kind": kind}
            noticed += metrics.get_sample_value("kvrelay_join_faults_total", labels) or 0
        assert noticed
        assert not metrics.get_sample_value("kvrelay_attempts_out_of_step_total")


async def _joined(stack: Stack, *names: str) -> None:
    await _until(lambda: {link.name for link in stack.core.registry.links} == set(names))


async def test_two_routers_share_their_workers_and_one_that_goes_takes_only_its_own():
    model = tiny_model("llama3")
    prompts = [random_prompt(60 + n, seed=n) for n in range(8)]
    expected = await asyncio.to_thread(reference_generate, model, prompts, NEW_TOKENS)
    async with local_stack(model, prefill=0, decode=0) as first:
        second = Stack(model, first.core.config, "inproc")
        await second.core.start()
        for stack in (first, second):
            numbers = itertools.count(1)  # sequences of two routers with one id
            stack.core.service._new_sequence_id = lambda numbers=numbers: next(numbers)
        port = second.core.join_port
        both = f"127.0.0.1:{first.core.join_port},127.0.0.1:{port}"
        for role in ("prefill", "decode"):
            await first.add_worker(role, f"{role}-0", router=both, **SETTINGS)
        await _joined(second, "prefill-0", "decode-0")

        async def all_of(stack: Stack) -> list:
            return await asyncio.gather(*(stack.answer(p, NEW_TOKENS) for p in prompts))

        for answers in await asyncio.gather(all_of(first), all_of(second)):
            assert [answer.tokens for answer in answers] == expected

        staying, going = asyncio.create_task(all_of(first)), asyncio.create_task(all_of(second))
        await _until(lambda: any(link.attempts for link in second.core.registry.links))
        await second.core.stop()
        for answer in await going:
            assert isinstance(answer.end, Finished | Failed)
        answers = await staying
        assert [answer.tokens for answer in answers] == expected
        assert all(answer.finished().stats.replays == 0 for answer in answers)
        await first.idle_pools(60.0)

        again = Stack(model, replace(second.core.config, join_port=port), "inproc")
        await again.core.start()
        await _joined(again, "prefill-0", "decode-0")
        assert [answer.tokens for answer in await all_of(again)] == expected
        await again.core.stop()
        for stack in (second, again):
            stack.telemetry.shutdown()


async def test_a_worker_whose_router_forgot_a_request_lets_go_of_it(monkeypatch):
    model = tiny_model("llama3")
    async with local_stack(model, prefill_settings=SETTINGS, decode_settings=SETTINGS) as stack:
        gate = threading.Event()
        runner = stack.workers["decode-0"].engine.runner
        step = runner.step

        def gated(*arguments: object) -> object:
            gate.wait(120)  # so that the answer can't end before a pulse
            return step(*arguments)

        monkeypatch.setattr(runner, "step", gated)
        stream = stack.submit(random_prompt(90, seed=1), NEW_TOKENS)
        link = stack.core.registry.get("decode-0")
        link.attempts.clear()  # a defect of the router
        await _until(lambda: link.load.let_go == 1)
        gate.set()
        stream.cancel("the test ends")
        await stack.idle_pools()
