"""The prefill worker's control messages in every order; the test is router and engine thread."""

import asyncio
from dataclasses import replace

import pytest
from bare_worker import (
    LAYOUT,
    TOKEN,
    VOCABULARY,
    bench,
    cancel,
    open_transfer,
    release,
    resend,
    submit_prefill,
    until,
)

from kvrelay_engine.batch import StepResult
from kvrelay_prefill.worker import PrefillWorker
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import InternalError
from kvrelay_transfer.setup import message_from_layout


@pytest.fixture
async def prefill():
    made = await bench(PrefillWorker)
    yield made
    made.worker.drop_all("the test ends")
    await made.stopped()
    await made.close()


def grant(sequence_id: int, address: bytes, **changes: object) -> pb.LeaseGranted:
    fields = {
        "lease_id": bytes(16),
        "epoch": 1,
        "generation": 1,
        "tag": 5,
        "transport_address": address,
        "worker_name": "d",
        "max_message_bytes": 4096,
        "ticket": bytes(32),
        "kv_layout": message_from_layout(LAYOUT),
    }
    lease = pb.Lease(**(fields | changes))
    return pb.LeaseGranted(sequence_id=sequence_id, lease=lease)


async def test_a_cancel_right_behind_the_submit_leaves_nothing(prefill):
    prefill.worker.handle(submit_prefill(1))
    prefill.worker.handle(cancel(1))  # the sender's task has not run yet
    await prefill.stopped()
    assert prefill.turn() is None


@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_a_release_or_cancel_at_any_stage_frees_the_blocks(prefill, turns):
    for sequence_id, end in ((1, cancel), (2, release)):
        prefill.worker.handle(submit_prefill(sequence_id, 60))
        for _ in range(turns):
            prefill.turn()
            await asyncio.sleep(0)
        prefill.worker.handle(end(sequence_id))
        prefill.worker.handle(end(sequence_id))
        await prefill.stopped()


async def test_messages_for_a_sequence_that_is_gone_are_ignored(prefill):
    prefill.worker.handle(submit_prefill(1))
    prefill.turn()
    prefill.worker.handle(release(1))
    await prefill.stopped()
    prefill.host.sent.clear()
    for late in (resend(1, 0), open_transfer(grant(1, b"x")), release(1), cancel(1)):
        prefill.worker.handle(late)
    await asyncio.sleep(0)
    assert prefill.host.sent == []


async def test_a_second_submit_of_a_running_sequence_is_ignored(prefill):
    prefill.worker.handle(submit_prefill(1))
    prefill.worker.handle(submit_prefill(1))
    assert len(prefill.turn().slices) == 1
    prefill.worker.handle(cancel(1))
    prefill.worker.handle(submit_prefill(1))  # while the first one is still ending
    await prefill.stopped()
    assert prefill.turn() is None


async def test_a_one_token_answer_needs_no_lease_and_no_release(prefill):
    prefill.worker.handle(submit_prefill(1, max_tokens=1))
    prefill.turn()
    await prefill.stopped()
    (output,) = prefill.host.named("step_output")
    assert [(r.first_index, list(r.tokens), r.finish) for r in output.runs] == [
        (0, [TOKEN], pb.FINISH_REASON_LENGTH)
    ]
    assert not prefill.host.named("sequence_failed")


async def test_a_replays_first_token_is_numbered_after_those_emitted(prefill):
    prefill.worker.handle(submit_prefill(1, output_offset=4))
    prefill.turn()
    (output,) = prefill.host.named("step_output")
    assert output.runs[0].first_index == 4


async def test_blocks_stay_until_the_copy_that_reads_them_has_ended(prefill):
    gather, copying, go_on = prefill.host.pool.gather, asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow_gather(*args: object) -> None:
        loop.call_soon_threadsafe(copying.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(60)
        gather(*args)

    prefill.host.pool.gather = slow_gather
    prefill.worker.handle(submit_prefill(1))
    prefill.turn()
    prefill.worker.handle(open_transfer(grant(1, prefill.worker.kit.transport.address)))
    await copying.wait()
    for _ in range(3):
        prefill.worker.handle(cancel(1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    prefill.run_commands()
    assert prefill.scheduler.load().used_blocks == 2, "freed under a gather"
    go_on.set()
    await prefill.stopped()


async def test_a_send_that_nobody_takes_ends_at_the_deadline(prefill):
    never = asyncio.Event()

    async def send(*_: object) -> None:
        await never.wait()

    prefill.worker.kit.transport.send = send
    prefill.worker.handle(submit_prefill(1, deadline_seconds=0.05))
    prefill.turn()
    prefill.worker.handle(open_transfer(grant(1, b"somewhere")))
    await until(lambda: prefill.host.named("sequence_failed"))
    (failed,) = prefill.host.named("sequence_failed")
    assert failed.error.code == "deadline_exceeded"
    await prefill.stopped()


async def test_a_prompt_that_waits_for_blocks_ends_at_its_deadline(prefill):
    prefill.worker.handle(submit_prefill(1, 60))
    prefill.worker.handle(submit_prefill(2, 60, deadline_seconds=0.02))
    prefill.turn()
    await until(lambda: prefill.host.named("sequence_failed"))
    assert [f.sequence_id for f in prefill.host.named("sequence_failed")] == [2]
    prefill.turn()
    assert prefill.scheduler.load().waiting == 0


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"ticket": b"short"}, "lease_lost", "ticket of 5 bytes"),
        ({"kv_layout": pb.KvLayout()}, "layout_mismatch", "unknown KV dtype ''"),
        (
            {"kv_layout": message_from_layout(replace(LAYOUT, num_layers=3))},
            "layout_mismatch",
            "kv_layout.num_layers: this worker has 2, its peer 3",
        ),
    ],
)
async def test_a_lease_that_this_kv_does_not_fit_fails_its_prompt_alone(
    prefill, changes, code, text
):
    prefill.worker.handle(submit_prefill(1))
    prefill.worker.handle(submit_prefill(2))
    prefill.turn()
    address = prefill.worker.kit.transport.address
    prefill.worker.handle(open_transfer(grant(1, address, **changes)))
    await until(lambda: prefill.host.named("sequence_failed"))
    (failed,) = prefill.host.named("sequence_failed")
    assert (failed.sequence_id, failed.error.code) == (1, code)
    assert text in failed.error.message
    assert prefill.worker.open_sequences == 1


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"tokens": []}, "invalid_value", "0 prompt tokens"),
        ({"max_tokens": 0}, "invalid_value", "0 to generate"),
        ({"tokens": [1, VOCABULARY]}, "invalid_value", "token 100 is outside"),
        ({"tokens": [1] * 65}, "context_length_exceeded", "worker holds 64"),
    ],
)
async def test_what_no_step_could_compute_is_refused_and_the_worker_goes_on(
    prefill, fields, code, text
):
    prefill.worker.handle(submit_prefill(1, **fields))
    (failed,) = prefill.host.named("sequence_failed")
    assert failed.error.code == code
    assert text in failed.error.message
    assert prefill.turn() is None
    prefill.worker.handle(submit_prefill(2))
    prefill.turn()
    assert prefill.worker.open_sequences == 1


async def test_a_sequence_the_engine_gives_up_fails_alone(prefill):
    prefill.worker.handle(submit_prefill(1))
    prefill.worker.handle(submit_prefill(2))
    prefill.turn(lambda _: StepResult({2: TOKEN}, {1: InternalError("not finite")}))
    await until(lambda: prefill.host.named("sequence_failed"))
    (failed,) = prefill.host.named("sequence_failed")
    assert (failed.sequence_id, failed.error.code) == (1, "internal_error")
    assert prefill.worker.open_sequences == 1
    prefill.turn()
    assert prefill.scheduler.load().used_blocks == 2, "those of the other one"
