"""Every worker restarted one after another under load: each answer is that of an undisturbed run."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from local_stack import PATIENT_S, Answer, Stack, local_stack
from tiny_models import random_prompt, tiny_model

from kvrelay_router.requests.types import Placed

STREAMS = 100
AT_ONCE = 20
NEW_TOKENS = 60
ROLES = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"}


@dataclass
class Load:
    """Clients that ask again and again, each its own prompt, until they are told to stop."""

    stack: Stack
    prompts: list[list[int]]
    answers: list[tuple[int, Answer]] = field(default_factory=list)
    """Those that ended: number of the prompt, answer."""
    running: dict[int, Answer] = field(default_factory=dict)
    enough: bool = False

    async def run(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for number in range(len(self.prompts)):
                clients.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        for turn in range(1_000_000):
            if self.enough and len(self.answers) >= STREAMS:
                return
            answer = self.running[number] = Answer()
            # No block of an earlier turn is shared: every prompt is computed and moved again.
            stream = self.stack.submit(
                self.prompts[number], NEW_TOKENS, salt=b"%d %d" % (number, turn)
            )
            async for event in stream:
                answer.events.append(event)
            self.answers.append((number, self.running.pop(number)))

    def on(self, worker: str) -> list[Answer]:
        """Answers under way whose tokens that worker computes."""
        return [a for a in self.running.values() if a.tokens and _decode_worker(a) == worker]

    def before(self, worker: str) -> list[Answer]:
        """Answers under way whose prompt that worker reads."""
        return [a for a in self.running.values() if not a.tokens and _prefill_worker(a) == worker]


def _decode_worker(answer: Answer) -> str | None:
    placed = [e.path.decode_worker for e in answer.events if isinstance(e, Placed)]
    return placed[-1] if placed else None


def _prefill_worker(answer: Answer) -> str | None:
    placed = [e.path.prefill_worker for e in answer.events if isinstance(e, Placed)]
    return placed[-1] if placed else None


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENT_S):
        while not condition():
            await asyncio.sleep(0)


async def _restart(stack: Stack, name: str, **settings: object) -> None:
    await stack.workers[name].stop()
    await _until(lambda: name not in {w.name for w in stack.core.service.health().workers})
    await stack.add_worker(ROLES[name], name, **settings)


@pytest.mark.parametrize("grace_s", [PATIENT_S, 0.0], ids=["finished", "handed over"])
async def test_100_streams_survive_a_restart_of_every_worker(grace_s):
    prompts = [random_prompt(40 + 7 * n, seed=n) for n in range(AT_ONCE)]
    settings = {"drain_grace_s": grace_s, "max_batch_tokens": 128, "num_blocks": 400}
    async with local_stack(
        tiny_model("llama3"),
        prefill=2,
        decode=2,
        transport="ucx",
        prefill_settings=settings,
        decode_settings=settings,
        max_replays=20,
    ) as stack:
        undisturbed = [await stack.answer(p, NEW_TOKENS, salt=b"first") for p in prompts]
        load = Load(stack, prompts)
        asking = asyncio.create_task(load.run())
        for name, role in ROLES.items():
            await _until(lambda: (load.on if role == "decode" else load.before)(name))  # noqa: B023
            await _restart(stack, name, **settings)
        load.enough = True
        await asking
        assert len(load.answers) >= STREAMS
        for number, answer in load.answers:
            assert answer.finished()
            assert answer.tokens == undisturbed[number].tokens
        if not grace_s:
            replays = sum(answer.finished().stats.replays for _, answer in load.answers)
            assert replays >= 2, "each decode worker handed something over"
        for worker in await stack.idle_pools():
            assert worker.free_blocks + worker.cached_blocks == worker.total_blocks
        used = Counter(_decode_worker(answer) for _, answer in load.answers)
        assert set(used) == {"decode-0", "decode-1"}


async def test_a_stream_outlives_more_restarts_than_it_has_replays():
    model = tiny_model("llama3", max_position_embeddings=20_000)
    settings = {"drain_grace_s": 0.0}
    async with local_stack(model, decode=2, decode_settings=settings) as stack:
        load = Load(stack, [])
        stream, answer = stack.submit(random_prompt(30), 19_000), Answer()
        load.running[0] = answer

        async def read() -> None:
            async for event in stream:
                answer.events.append(event)

        reading = asyncio.create_task(read())
        for restart in range(1, 6):
            await _until(lambda: answer.tokens)
            worker = _decode_worker(answer)
            await _restart(stack, worker, **settings)
            await _until(lambda: reading.done() or _placed(answer) == restart + 1)  # noqa: B023
        stream.cancel("seen enough")
        await reading
        assert _placed(answer) == 6


def _placed(answer: Answer) -> int:
    return sum(isinstance(event, Placed) for event in answer.events)
