"""KV that arrives damaged, late or not at all is never decoded: the answer stays exact."""

import asyncio

import pytest
from local_stack import Answer, Stack, local_stack
from tiny_models import random_prompt, reference_generate, tiny_model

import kvrelay_transfer.setup
from kvrelay_router.requests.types import Failed, PathKind, Placed
from kvrelay_transfer.inproc import Fault, Faults, InprocTransport

NEW_TOKENS = 10
PROMPT_TOKENS = 100
SETTINGS = {"max_batch_tokens": 32}
"""Four chunks, so four KV messages and the record."""
SHORT_LEASE_S = 1.0
"""For what only the end of a lease notices."""
RECORD = 4


@pytest.fixture
def faults(monkeypatch) -> Faults:
    """What goes wrong with messages of the prefill worker, the first to make a transport."""
    plan = Faults()
    made: list[InprocTransport] = []

    def create(uri: str) -> InprocTransport:
        made.append(InprocTransport(faults=plan if not made else None))
        return made[-1]

    monkeypatch.setattr(kvrelay_transfer.setup, "create_transport", create)
    return plan


async def _exact_answer(stack: Stack, seed: int = 1, **options: object):
    prompt = random_prompt(PROMPT_TOKENS, seed=seed)
    (expected,) = await asyncio.to_thread(
        reference_generate,
        stack.model_dir,
        [prompt],
        NEW_TOKENS,
    )
    answer = await stack.answer(prompt, NEW_TOKENS, **options)
    assert answer.tokens == expected, answer.end
    return answer.finished()


def _stack(**router: object):
    lease = {"lease_s": router["lease_s"]} if "lease_s" in router else {}
    return local_stack(
        tiny_model("llama3"),
        prefill_settings=SETTINGS | lease,
        decode_settings=SETTINGS | lease,
        **router,
    )


async def _until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def _lose(stack: Stack, name: str) -> None:
    """End a worker without a word to anybody."""
    lost = stack.workers.pop(name)
    lost.task.cancel()
    await asyncio.gather(lost.task, return_exceptions=True)


async def _answer_losing_its_decode_worker(stack: Stack, prompt: list[int], length: int) -> Answer:
    """The worker goes once the first tokens are here, the others still to come."""
    answer, losing = Answer(), None
    async for event in stack.submit(prompt, length):
        answer.events.append(event)
        if isinstance(event, Placed):
            worker = event.path.decode_worker
        if answer.tokens and losing is None:
            losing = asyncio.create_task(_lose(stack, worker))
    await losing
    return answer


@pytest.mark.parametrize("bit", [3, 8 * 40, 8 * 159, 8 * 200 + 5, 8 * 3000])
@pytest.mark.parametrize("message", [0, 2, RECORD])
async def test_a_flipped_bit_is_noticed_and_the_message_sent_again(faults, message, bit):
    if message == RECORD:
        bit %= 8 * 160
    faults.plan.append(Fault("corrupt", nth=message, at=bit))
    async with _stack() as stack:
        finished = await _exact_answer(stack)
        assert finished.stats.path.kind is PathKind.DISAGGREGATED
        assert finished.stats.replays == 0
        assert len(faults.fired) == 1
        decode = stack.core.registry.get("decode-0")
        await _until(lambda: decode.load.corrupt_frames)
        assert decode.load.corrupt_frames == 1


async def test_several_damaged_messages_of_one_transfer(faults):
    faults.plan += [Fault("corrupt", nth=n, at=8 * 500) for n in (0, 1, 3)]
    async with _stack() as stack:
        assert (await _exact_answer(stack)).stats.replays == 0
        assert len(faults.fired) == 3


async def test_a_link_that_damages_everything_ends_in_a_local_prefill(faults):
    faults.plan += [Fault("corrupt", nth=n, at=8 * 500) for n in range(60)]
    async with _stack() as stack:
        finished = await _exact_answer(stack)
        assert finished.stats.path.kind is PathKind.LOCAL
        assert finished.stats.replays == 1


@pytest.mark.parametrize("message", [0, 2, RECORD])
async def test_a_message_that_never_arrives_costs_a_lease_time_not_the_answer(faults, message):
    faults.plan.append(Fault("drop", nth=message))
    async with _stack(lease_s=SHORT_LEASE_S, max_replays=20) as stack:
        await _exact_answer(stack)
        await stack.idle_pools()


@pytest.mark.parametrize("message", [2, RECORD])
async def test_a_message_that_never_arrives_is_asked_for_long_before_a_lease_ends(faults, message):
    faults.plan.append(Fault("drop", nth=message))
    async with _stack(lease_s=300.0) as stack:
        finished = await _exact_answer(stack, deadline_s=200.0)
        assert finished.stats.path.kind is PathKind.DISAGGREGATED
        assert finished.stats.replays == 0


@pytest.mark.parametrize("kind", ["delay", "truncate", "duplicate"])
async def test_delayed_truncated_and_repeated_messages(faults, kind):
    faults.plan.append(Fault(kind, nth=1, at=300, seconds=0.4))
    async with _stack() as stack:
        await _exact_answer(stack)
        await _exact_answer(stack, seed=2)


@pytest.mark.parametrize("written", [0, 100, 5000])
async def test_a_sender_that_dies_in_the_middle_of_a_message(faults, written):
    faults.plan.append(Fault("lose_peer", nth=1, at=written))
    async with _stack() as stack:
        await _exact_answer(stack)
        await _exact_answer(stack, seed=2)


async def test_a_worker_that_vanishes_is_replaced_by_local_prefill_and_joins_again(faults):
    faults.plan.append(Fault("delay", nth=1, seconds=600.0))
    async with _stack() as stack:
        prompt = random_prompt(PROMPT_TOKENS, seed=3)
        expected = reference_generate(stack.model_dir, [prompt], NEW_TOKENS)[0]
        running = asyncio.create_task(stack.answer(prompt, NEW_TOKENS))
        await _until(lambda: faults.fired)
        await _lose(stack, "prefill-0")
        answer = await running
        assert answer.tokens == expected
        assert answer.finished().stats.path.kind is PathKind.LOCAL
        await stack.add_worker("prefill", "prefill-0", **SETTINGS)
        again = await stack.answer(random_prompt(50, seed=9), NEW_TOKENS)
        assert again.finished().stats.path.kind is PathKind.DISAGGREGATED


async def test_losing_the_only_decode_worker_is_a_typed_error_within_the_replay_wait(faults):
    async with _stack(replay_wait_s=0.5) as stack:
        answer = await _answer_losing_its_decode_worker(stack, random_prompt(30), 900)
        assert isinstance(answer.end, Failed)
        assert answer.end.error.code == "worker_lost"
        assert answer.tokens, "what was sent before stays"
        await stack.idle_pools()


async def test_losing_one_of_two_decode_workers_continues_the_stream_exactly(faults):
    async with _stack(decode=2) as stack:
        prompt = random_prompt(30, seed=4)
        undisturbed = await stack.answer(prompt, 900, salt=b"no blocks to share")
        answer = await _answer_losing_its_decode_worker(stack, prompt, 900)
        assert answer.tokens == undisturbed.tokens
        assert answer.finished().stats.replays == 1
