"""The decode worker's control messages in every order; the test is router and engine thread."""

import asyncio

import pytest
from bare_worker import (
    TOKEN,
    VOCABULARY,
    Bench,
    bench,
    cancel,
    open_transfer,
    release,
    sample,
    submit_decode,
    submit_prefill,
    until,
)

from kvrelay_decode.worker import DecodeWorker
from kvrelay_engine.batch import StepResult
from kvrelay_prefill.worker import PrefillWorker
from kvrelay_protocol.errors import InternalError


@pytest.fixture
async def decode():
    made = await bench(DecodeWorker)
    yield made
    made.worker.drop_all("the test ends")
    await made.stopped()
    await made.close()


@pytest.fixture
async def prefill():
    made = await bench(PrefillWorker)
    yield made
    made.worker.drop_all("the test ends")
    await made.stopped()
    await made.close()


async def hand_over(prefill: Bench, decode: Bench, sequence_id: int, **fields: object) -> None:
    """One prompt computed by one worker, its KV received by the other."""
    decode.worker.handle(submit_decode(sequence_id, **fields))
    prefill.worker.handle(submit_prefill(sequence_id, **fields))
    decode.turn()
    prefill.turn()
    await until(lambda: decode.host.named("lease_granted"))
    prefill.worker.handle(open_transfer(decode.host.named("lease_granted")[-1]))
    await until(lambda: decode.host.named("kv_received"))
    prefill.worker.handle(release(sequence_id))


async def test_a_transferred_sequence_runs_to_its_end_and_leaves_nothing(prefill, decode):
    await hand_over(prefill, decode, 1)
    while decode.turn():
        pass
    runs = [run for m in decode.host.named("step_output") for run in m.runs]
    assert [run.first_index for run in runs] == [1, 2, 3, 4]
    await decode.stopped()


async def test_a_cancel_in_the_tick_of_the_reservation_frees_the_blocks(decode):
    decode.worker.handle(submit_decode(1))
    decode.turn()  # the transfer's task exists now, and has not run yet
    decode.worker.handle(cancel(1))
    await decode.stopped()
    assert decode.host.sent == []


async def test_a_cancel_before_the_reservation_is_delivered_frees_the_blocks(decode):
    decode.worker.handle(submit_decode(1))
    decode.run_commands()
    decode.scheduler.schedule()
    late = decode.scheduler.take_events()
    decode.worker.handle(cancel(1))
    decode.worker.events(late)
    await decode.stopped()
    assert decode.host.sent == []


@pytest.mark.parametrize("expect_kv", [True, False])
async def test_a_cancel_before_any_turn_frees_the_place_in_line(decode, expect_kv):
    decode.worker.handle(submit_decode(1, expect_kv=expect_kv))
    decode.worker.handle(cancel(1))
    assert decode.turn() is None
    await decode.stopped()


async def test_a_cancel_between_the_last_message_and_the_start_wins(prefill, decode):
    await hand_over(prefill, decode, 1)
    decode.worker.handle(cancel(1))  # the start is posted, and the abort behind it
    assert decode.turn() is None
    await decode.stopped()


async def test_a_cancel_while_a_step_runs_drops_the_steps_token(prefill, decode):
    await hand_over(prefill, decode, 1)
    decode.host.sent.clear()
    decode.run_commands()
    batch = decode.scheduler.schedule()
    decode.worker.handle(cancel(1))
    decode.scheduler.commit(batch, sample(batch))
    decode.worker.events(decode.scheduler.take_events())
    assert decode.host.sent == []
    assert decode.turn() is None


async def test_control_messages_that_fit_nothing_change_nothing(decode):
    decode.worker.handle(cancel(1))
    decode.worker.handle(submit_decode(1))
    decode.worker.handle(submit_decode(1))
    decode.turn()
    decode.worker.handle(submit_decode(1, expect_kv=False))
    decode.worker.handle(release(1))  # a prefill worker's message
    assert decode.turn() is None
    assert decode.worker.open_sequences == 1
    decode.worker.handle(cancel(1))
    decode.worker.handle(cancel(1))
    decode.worker.handle(submit_decode(1))  # while the first one's receive is being withdrawn
    await decode.stopped()
    assert decode.turn() is None


async def test_more_leases_than_staging_buffers_wait_their_turn_and_all_end():
    decode = await bench(DecodeWorker, blocks=24, staging=1)
    prefill = await bench(PrefillWorker, staging=1)
    for n in range(1, 7):
        decode.worker.handle(submit_decode(n, 6, max_tokens=2))
        prefill.worker.handle(submit_prefill(n, 6, max_tokens=2))
    decode.turn()
    prefill.turn()
    for n in range(1, 7):
        await until(lambda n=n: len(decode.host.named("lease_granted")) == n)
        prefill.worker.handle(open_transfer(decode.host.named("lease_granted")[-1]))
        await until(lambda n=n: len(decode.host.named("kv_received")) == n)
        prefill.worker.handle(release(n))
    while decode.turn():
        pass
    await decode.stopped()
    await prefill.stopped()
    await decode.close()
    await prefill.close()


async def test_a_lease_that_waits_for_a_staging_buffer_ends_at_its_deadline():
    decode = await bench(DecodeWorker, staging=1)
    decode.worker.handle(submit_decode(1))
    decode.worker.handle(submit_decode(2, deadline_seconds=0.02))
    decode.turn()
    await until(lambda: decode.host.named("sequence_failed"))
    (failed,) = decode.host.named("sequence_failed")
    assert (failed.sequence_id, failed.error.code) == (2, "deadline_exceeded")
    decode.worker.drop_all("the test ends")
    await decode.stopped()
    await decode.close()


async def test_losing_the_router_mid_transfer_gives_every_block_back(prefill, decode):
    for n in (1, 2, 3):
        decode.worker.handle(submit_decode(n, expect_kv=n != 2))
    decode.turn()
    await until(lambda: len(decode.host.named("lease_granted")) == 2)
    decode.worker.drop_all("the router is gone")
    await decode.stopped()
    decode.host.sent.clear()
    await hand_over(prefill, decode, 9)  # and the next router's work goes on
    assert decode.turn() is not None


async def test_a_receive_is_stopped_before_blocks_and_buffer_go_back_however_often_cancelled():
    decode = await bench(DecodeWorker)
    transport, confirmed = decode.worker.kit.transport, asyncio.Event()
    post = transport.receive

    def receive(tag, buffer):
        posted = post(tag, buffer)
        withdraw = posted.cancel

        async def slowly() -> bool:
            await confirmed.wait()
            return await withdraw()

        posted.cancel = slowly
        return posted

    transport.receive = receive
    decode.worker.handle(submit_decode(1))
    decode.turn()
    await until(lambda: decode.host.named("lease_granted"))
    for _ in range(3):
        decode.worker.handle(cancel(1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    decode.turn()
    assert decode.scheduler.load().leased_blocks == 2, "freed while its receive is posted"
    assert decode.worker.kit.staging.held == 1
    confirmed.set()
    await decode.stopped()
    await decode.close()


async def test_a_tiny_pool_serves_many_reservations_one_after_the_other():
    decode, prefill = await bench(DecodeWorker, blocks=4), await bench(PrefillWorker)
    for n in range(1, 9):
        decode.worker.handle(submit_decode(n, 9, max_tokens=6))
        prefill.worker.handle(submit_prefill(n, 9, max_tokens=6))
    opened = 0
    while decode.worker.open_sequences:
        decode.turn()
        prefill.turn()
        await asyncio.sleep(0.001)
        granted = decode.host.named("lease_granted")
        for grant in granted[opened:]:
            prefill.worker.handle(open_transfer(grant))
        opened = len(granted)
        for received in decode.host.named("kv_received"):
            prefill.worker.handle(release(received.sequence_id))
    assert not decode.host.named("sequence_failed")
    await decode.stopped()
    await prefill.stopped()
    await decode.close()
    await prefill.close()


async def test_a_hand_over_that_left_blocks_out_is_never_decoded(prefill, decode):
    prefill.say_written = False  # the record comes, the blocks don't
    decode.worker.handle(submit_decode(1))
    prefill.worker.handle(submit_prefill(1))
    decode.turn()
    prefill.turn()
    await until(lambda: decode.host.named("lease_granted"))
    prefill.worker.handle(open_transfer(decode.host.named("lease_granted")[-1]))
    await until(lambda: decode.host.named("sequence_failed"))
    (failed,) = decode.host.named("sequence_failed")
    assert failed.error.code == "corrupt_frame"
    assert decode.turn() is None


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
    decode, fields, code, text
):
    decode.worker.handle(submit_decode(1, **fields))
    (failed,) = decode.host.named("sequence_failed")
    assert failed.error.code == code
    assert text in failed.error.message
    assert decode.turn() is None
    decode.worker.handle(submit_decode(2))
    decode.turn()
    assert decode.worker.open_sequences == 1


async def test_a_sequence_the_engine_gives_up_fails_alone(decode):
    for n in (1, 2):
        decode.worker.handle(submit_decode(n, expect_kv=False))
    decode.turn(lambda _: StepResult({2: TOKEN}, {1: InternalError("not finite")}))
    (failed,) = decode.host.named("sequence_failed")
    assert (failed.sequence_id, failed.error.code) == (1, "internal_error")
    assert [s.sequence_id for s in decode.turn().slices] == [2]
