"""What the router says of its attempts after every heartbeat, and what it does with the answer."""

import asyncio

from fake_worker import answer

from kvrelay_protocol import errors
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_router.requests.types import Failed, Finished, Resumed

from .conftest import a_request, collect, tokens_of

PROMPT = a_request().prompt_tokens


def live(worker) -> set[int]:
    return set(worker.pulses[-1].live) if worker.pulses else set()


def stalled(worker) -> set[int]:
    return set(worker.pulses[-1].stalled) if worker.pulses else set()


async def test_a_pulse_names_what_each_worker_has_to_have(make_rig) -> None:
    rig = await make_rig()
    prefill = await rig.join("p0", "prefill")
    decode = await rig.join("d0", "decode", pause_at_index=4)
    stream = rig.submit()
    await prefill.until(lambda: "release_kv" in prefill.kinds())
    (sequence_id,) = decode.open
    seen = len(prefill.pulses)
    await decode.until(lambda: live(decode) == {sequence_id})
    # It was told to let go, so nobody expects it to have the sequence.
    await prefill.until(lambda: len(prefill.pulses) > seen + 1)
    assert live(prefill) == set()
    stream.cancel("the test ends")
    await collect(stream)
    await decode.until(lambda: live(decode) == set())


async def test_an_attempt_that_its_worker_does_not_have_is_replayed(make_rig) -> None:
    rig = await make_rig()
    forgetful = await rig.join("d0", "decode", forget=1)
    stream = rig.submit()
    await forgetful.until(lambda: "submit_decode" in forgetful.kinds())
    await rig.join("d1", "decode")
    events = await collect(stream)
    assert tokens_of(events) == answer(PROMPT, 8)
    assert isinstance(events[-1], Finished)
    assert events[-1].stats.path.decode_worker == "d1"
    assert rig.metric("sequences_unknown_total") == 1
    assert rig.metric("replays_total", reason="worker_lost") == 1


async def test_a_prompt_that_its_worker_does_not_have_is_replayed(make_rig) -> None:
    rig = await make_rig()
    await rig.join("d0", "decode")
    await rig.join("p0", "prefill", forget=1)
    events = await collect(rig.submit())
    assert tokens_of(events) == answer(PROMPT, 8)
    assert rig.metric("sequences_unknown_total") == 1


async def test_what_is_over_may_be_unknown(make_rig) -> None:
    rig = await make_rig()
    decode = await rig.join("d0", "decode", pause_at_index=4)
    stream = rig.submit()
    await decode.until(lambda: bool(decode.open))
    (sequence_id,) = decode.open
    stream.cancel("the test ends")
    await collect(stream)
    for unknown in ([sequence_id], [1, 2, 3]):
        decode.send(pb.WorkerMessage(heartbeat=pb.Heartbeat(load=decode.load, unknown=unknown)))
    pulses = len(decode.pulses)
    await decode.until(lambda: len(decode.pulses) > pulses + 1)
    assert rig.metric("sequences_unknown_total") == 0
    assert rig.core.registry.get("d0") is not None


async def test_kv_that_nobody_computes_is_stalled_until_its_worker_goes_on(make_rig) -> None:
    rig = await make_rig(lease_s=0.5)
    prefill = await rig.join("p0", "prefill", hold_prefill=True)
    decode = await rig.join("d0", "decode")
    prefill.report(backlog_tokens=40, computed_tokens=100)
    stream = rig.submit()
    await decode.until(lambda: bool(decode.open))
    (sequence_id,) = decode.open
    await decode.until(lambda: stalled(decode) == {sequence_id})
    assert live(decode) == live(prefill) == {sequence_id}
    link = rig.core.registry.get("p0")
    stuck_since = link.progress_at
    prefill.report(computed_tokens=200)
    await decode.until(lambda: link.progress_at > stuck_since)
    stream.cancel("the test ends")
    await collect(stream)


async def test_kv_that_is_computed_and_does_not_come_is_stalled_though_its_worker_is_idle(
    make_rig,
) -> None:
    rig = await make_rig()
    await rig.join("p0", "prefill")
    decode = await rig.join("d0", "decode", hold_lease=True)
    stream = rig.submit()
    await decode.until(lambda: bool(decode.open))
    (sequence_id,) = decode.open
    await decode.until(lambda: stalled(decode) == {sequence_id})
    stream.cancel("the test ends")
    assert tokens_of(await collect(stream)) == answer(PROMPT, 1)


async def test_a_prefill_worker_with_nothing_to_compute_is_not_stalled(make_rig) -> None:
    rig = await make_rig(lease_s=0.5)
    prefill = await rig.join("p0", "prefill", hold_prefill=True)
    decode = await rig.join("d0", "decode")
    stream = rig.submit()
    await decode.until(lambda: bool(decode.open))
    link, seen = rig.core.registry.get("p0"), len(decode.pulses)
    await decode.until(lambda: len(decode.pulses) > seen + 5)
    assert link.progress_at == link.last_seen
    prefill.die()
    assert tokens_of(await collect(stream)) == answer(PROMPT, 8)


async def test_tokens_out_of_step_are_counted_and_replayed(make_rig) -> None:
    rig = await make_rig()
    decode = await rig.join("d0", "decode", pause_at_index=3)
    stream = rig.submit()
    events = []
    async for event in stream:
        events.append(event)
        if len(tokens_of(events)) == 3:
            break
    (sequence_id,) = decode.open
    run = pb.TokenRun(sequence_id=sequence_id, first_index=5, tokens=[1])
    decode.script.pause_at_index = None
    decode.send(pb.WorkerMessage(step_output=pb.StepOutput(runs=[run])))
    events += await collect(stream)
    assert tokens_of(events) == answer(PROMPT, 8)
    assert rig.metric("attempts_out_of_step_total") == 1
    assert [e.from_index for e in events if isinstance(e, Resumed)] == [3]
    assert rig.metric("replay_gap_seconds_count") == 1
    assert rig.metric("loss_to_error_seconds_count") == 0


async def test_the_time_from_a_loss_to_its_error_is_measured(make_rig) -> None:
    rig = await make_rig(replay_wait_s=0.05)
    decode = await rig.join("d0", "decode", pause_at_index=3)
    stream = rig.submit()
    await decode.until(lambda: bool(decode.open))
    decode.die()
    events = await collect(stream)
    assert isinstance(events[-1], Failed)
    assert isinstance(events[-1].error, errors.WorkerLost)
    assert rig.metric("loss_to_error_seconds_count") == 1
    assert rig.metric("loss_to_error_seconds_sum") >= 0.05


async def test_faults_of_streams_are_exported(make_rig) -> None:
    rig = await make_rig()
    decode = await rig.join("d0", "decode")
    link = rig.core.registry.get("d0")
    repeat = pb.WorkerMessage(drained=pb.Drained(), number=1)
    await decode.until(lambda: bool(decode.pulses))  # so message 1 has come
    rig.core.registry.written(link, repeat)
    assert rig.metric("join_faults_total", direction="up", kind="repeated") == 1
    decode.report(repeated_messages=2, missing_messages=3, silent_routers=4, let_go=5)
    await decode.until(lambda: rig.metric("sequences_let_go_total") == 5)
    for kind, count in (("repeated", 2), ("missing", 3), ("silent", 4)):
        assert rig.metric("join_faults_total", direction="down", kind=kind) == count
    rig.core.registry.written(link, pb.WorkerMessage(drained=pb.Drained(), number=1 << 40))
    assert rig.metric("join_faults_total", direction="up", kind="missing") == 1
    await asyncio.wait_for(decode.closed.wait(), 20)
