"""What a prefill worker does with its routers' pulses, and with routers that are gone."""

import asyncio

import pytest
from bare_worker import bench, release, submit_prefill, until

from kvrelay_prefill.worker import PrefillWorker
from kvrelay_protocol import fleet_pb2 as pb


@pytest.fixture
async def prefill():
    made = await bench(PrefillWorker)
    yield made
    made.worker.drop_all("the test ends")
    await made.stopped()
    await made.close()


def load_of(prefill) -> pb.Load:
    load = pb.Load()
    prefill.worker.add_load(load)
    return load


async def test_what_a_pulse_does_not_name_is_let_go_and_what_is_not_here_is_said(prefill):
    for sequence_id in (1, 2):
        prefill.worker.handle(submit_prefill(sequence_id))
    prefill.turn()
    assert prefill.worker.pulse(pb.Pulse(live=[2, 7])) == [7]
    await until(lambda: prefill.worker.open_sequences == 1)
    prefill.turn()
    assert prefill.scheduler.load().used_blocks == 2
    assert load_of(prefill).let_go == 1
    assert not prefill.host.named("sequence_failed"), "nobody is left to be told"


async def test_a_prompt_that_was_released_is_no_orphan(prefill):
    prefill.worker.handle(submit_prefill(1))
    prefill.turn()
    prefill.worker.handle(release(1))  # its sender has not noticed yet
    assert prefill.worker.pulse(pb.Pulse()) == []
    await prefill.stopped()
    assert load_of(prefill).let_go == 0


async def test_pulses_and_losses_of_one_router_leave_the_others_prompts_alone(prefill):
    for session in (0, 5):
        prefill.worker.handle(submit_prefill(1), session)
    prefill.turn()
    outputs = [
        (whose, message.step_output.runs[0].sequence_id)
        for message, whose in zip(prefill.host.sent, prefill.host.sessions, strict=True)
        if message.HasField("step_output")
    ]
    assert sorted(outputs) == [(0, 1), (5, 1)]
    assert prefill.worker.pulse(pb.Pulse(live=[1]), 5) == []
    prefill.worker.drop(0, "the router is gone")
    await until(lambda: prefill.worker.open_sequences == 1)
    prefill.worker.handle(release(1), 0)  # of a session that is over
    await asyncio.sleep(0)
    assert prefill.worker.open_sequences == 1
    prefill.worker.handle(release(1), 5)
    await prefill.stopped()
