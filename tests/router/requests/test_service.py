"""The router core against fake workers over real gRPC."""

import asyncio

import pytest
from fake_worker import answer

from kvrelay_protocol import errors
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.trace import TraceContext
from kvrelay_router.requests.machine import MAX_ASKS
from kvrelay_router.requests.types import (
    Failed,
    Finished,
    FinishReason,
    Path,
    PathKind,
    Placed,
    Queued,
    Resumed,
    Started,
    Tokens,
)

from .conftest import a_request, collect, terminals_of, tokens_of

PROMPT = a_request().prompt_tokens


def typed(event: object, kind: type) -> object:
    assert isinstance(event, kind), event
    return event


def error_of(events: list) -> errors.KvrelayError:
    (terminal,) = terminals_of(events)
    assert isinstance(terminal, Failed), terminal
    return terminal.error


async def read_tokens(stream, count: int) -> list:
    """The events up to the `count`-th token."""
    events = []
    async for event in stream:
        events.append(event)
        if len(tokens_of(events)) == count:
            break
    return events


def finished(events: list) -> Finished:
    (terminal,) = terminals_of(events)
    assert isinstance(terminal, Finished), terminal
    assert events[-1] is terminal
    return terminal


async def test_disaggregated_request_streams_every_token_once(make_rig) -> None:
    rig = await make_rig()
    prefill = await rig.join("p0", "prefill")
    # Slow enough for the prefill worker's report, which nobody waits for, to come before the end.
    decode = await rig.join("d0", "decode", step_s=0.01)
    events = await collect(rig.submit())

    path = Path(PathKind.DISAGGREGATED, "least_loaded", "p0", "d0")
    assert events[:2] == [Placed(path, 0), Started(16)]
    assert tokens_of(events) == answer(PROMPT, 8)
    end = finished(events)
    assert end.reason is FinishReason.LENGTH
    assert end.stats.path == path
    assert (end.stats.prompt_tokens, end.stats.completion_tokens) == (40, 8)
    assert (end.stats.kv_bytes, end.stats.kv_transport) == (64 * 40, "inproc")
    assert end.stats.prefill_s == pytest.approx(0.002)
    await prefill.until(lambda: not prefill.open)
    assert prefill.kinds() == ["submit_prefill", "open_transfer", "release_kv"]
    # What the two workers say last may cross.
    assert [kind for kind in decode.kinds() if kind != "all_sent"] == ["submit_decode"]
    assert not decode.open
    assert prefill.messages("submit_prefill")[0].sequence == (
        decode.messages("submit_decode")[0].sequence
    )
    sequence = decode.messages("submit_decode")[0].sequence
    assert (sequence.request_id, sequence.output_offset, sequence.max_tokens) == ("req-1", 0, 8)
    assert 19 < sequence.deadline_seconds <= 20


async def test_decode_worker_alone_serves_locally(make_rig) -> None:
    rig = await make_rig()
    decode = await rig.join("d0", "decode", stop_after=3)
    events = await collect(rig.submit())
    assert events[0] == Placed(Path(PathKind.LOCAL, "no_prefill_worker", None, "d0"), 0)
    assert tokens_of(events) == answer(PROMPT, 4)
    assert finished(events).reason is FinishReason.STOP
    assert not decode.messages("submit_decode")[0].expect_kv


async def test_first_token_that_ends_the_answer_cancels_both(make_rig) -> None:
    rig = await make_rig()
    prefill, decode = await rig.join("p0", "prefill"), await rig.join("d0", "decode")
    events = await collect(rig.submit(max_tokens=1))
    assert tokens_of(events) == answer(PROMPT, 1)
    assert finished(events).reason is FinishReason.LENGTH
    await prefill.until(lambda: not prefill.open and not decode.open)


async def test_concurrent_requests_over_two_decode_workers(make_rig) -> None:
    rig = await make_rig()
    await rig.join("p0", "prefill")
    workers = [await rig.join(f"d{i}", "decode") for i in range(2)]
    prompts = [tuple(range(i, i + 20)) for i in range(32)]
    results = await asyncio.gather(
        *(collect(rig.submit(prompt_tokens=p, request_id=f"r{i}")) for i, p in enumerate(prompts)),
    )
    for prompt, events in zip(prompts, results, strict=True):
        assert tokens_of(events) == answer(prompt, 8)
    assert all(len(w.messages("submit_decode")) == 16 for w in workers)
    assert rig.metric("request_success_total", finished_reason="length") == 32
    assert rig.metric("generation_tokens_total") == 32 * 8
    assert rig.metric("num_requests_running") == 0
    assert all(link.pending.blocks == 0 for link in rig.core.registry.links)


async def test_worker_lost_before_its_queued_batch_left_costs_no_request(make_rig) -> None:
    rig = await make_rig()
    prefill, dying = await rig.join("p0", "prefill"), await rig.join("d0", "decode")
    prompts = [tuple(range(i, i + 20)) for i in range(5)]
    streams = [rig.submit(prompt_tokens=p, request_id=f"r{i}") for i, p in enumerate(prompts)]
    # No turn of the loop yet: every dispatch is still in line.
    dying.die()
    await rig.join("d1", "decode")
    for prompt, events in zip(prompts, await asyncio.gather(*map(collect, streams)), strict=True):
        assert tokens_of(events) == answer(prompt, 8)
        assert finished(events).stats.replays == 1
    await prefill.until(lambda: not prefill.open)


@pytest.mark.parametrize("index", [1, 4, 7])
async def test_decode_worker_lost_mid_answer_is_replayed_on_the_other(make_rig, index) -> None:
    rig = await make_rig()
    await rig.join("p0", "prefill")
    dying = await rig.join("d0", "decode", pause_at_index=index)
    stream = rig.submit()
    events = await read_tokens(stream, index)
    heir = await rig.join("d1", "decode")
    dying.die()
    events += await collect(stream)
    assert tokens_of(events) == answer(PROMPT, 8)
    end = finished(events)
    assert end.stats.replays == 1
    assert end.stats.path == Path(PathKind.DISAGGREGATED, "replay", "p0", "d1")
    assert heir.messages("submit_decode")[0].sequence.output_offset == index
    assert [e.from_index for e in events if isinstance(e, Resumed)] == [index]
    assert rig.metric("replays_total", reason="worker_lost") == 1


async def test_no_other_worker_ends_in_worker_lost_within_the_replay_wait(make_rig) -> None:
    rig = await make_rig(replay_wait_s=0.3)
    prefill = await rig.join("p0", "prefill")
    dying = await rig.join("d0", "decode", pause_at_index=3)
    stream = rig.submit()
    events = await read_tokens(stream, 3)
    dying.die()
    events += await collect(stream)
    assert isinstance(error_of(events), errors.WorkerLost)
    assert "d0" in error_of(events).message
    assert tokens_of(events) == answer(PROMPT, 3)
    await prefill.until(lambda: not prefill.open)


async def test_worker_that_comes_back_in_time_takes_the_stream_over(make_rig) -> None:
    rig = await make_rig(replay_wait_s=10.0)
    dying = await rig.join("d0", "decode", pause_at_index=2)
    stream = rig.submit()
    events = await read_tokens(stream, 2)
    dying.die()
    await dying.until(lambda: not rig.core.registry.links)
    await rig.join("d0", "decode")
    events += await collect(stream)
    assert tokens_of(events) == answer(PROMPT, 8)


async def test_prefill_worker_lost_before_its_first_token_goes_local(make_rig) -> None:
    rig = await make_rig()
    prefill = await rig.join("p0", "prefill", hold_prefill=True)
    decode = await rig.join("d0", "decode")
    stream = rig.submit()
    await prefill.until(lambda: "submit_prefill" in prefill.kinds())
    prefill.die()
    events = await collect(stream)
    assert tokens_of(events) == answer(PROMPT, 8)
    assert finished(events).stats.path == Path(PathKind.LOCAL, "replay", None, "d0")
    assert decode.kinds() == ["submit_decode", "cancel", "submit_decode"]


async def test_prefill_worker_lost_after_the_transfer_changes_nothing(make_rig) -> None:
    rig = await make_rig()
    prefill = await rig.join("p0", "prefill")
    await rig.join("d0", "decode", step_s=0.02)
    stream = rig.submit()
    await prefill.until(lambda: "release_kv" in prefill.kinds())
    prefill.die()
    events = await collect(stream)
    assert tokens_of(events) == answer(PROMPT, 8)
    assert finished(events).stats.replays == 0


async def test_corrupt_kv_is_sent_again_and_then_computed_locally(make_rig) -> None:
    rig = await make_rig()
    prefill = await rig.join("p0", "prefill")
    decode = await rig.join("d0", "decode", missing_rounds=2)
    assert finished(await collect(rig.submit())).stats.replays == 0
    assert prefill.kinds().count("resend_kv") == 2

    decode.script.missing_rounds = MAX_ASKS + 1
    events = await collect(rig.submit(request_id="req-2"))
    assert tokens_of(events) == answer(PROMPT, 8)
    assert finished(events).stats.path == Path(PathKind.LOCAL, "replay", None, "d0")
    assert rig.metric("replays_total", reason="corrupt_frame") == 1
    await prefill.until(lambda: not prefill.open)


async def test_worker_failure_of_the_request_itself_is_not_retried(make_rig) -> None:
    rig = await make_rig()
    fail = pb.Error(code="context_length_exceeded", message="5000 tokens, the limit is 4096")
    decode = await rig.join("d0", "decode", fail=fail)
    events = await collect(rig.submit())
    assert isinstance(error_of(events), errors.ContextOverflow)
    assert len(decode.messages("submit_decode")) == 1
    assert rig.metric("request_failure_total", code="context_length_exceeded") == 1


async def test_replays_are_bounded(make_rig) -> None:
    rig = await make_rig(max_replays=2)
    decode = await rig.join("d0", "decode", fail=pb.Error(code="lease_lost", message="expired"))
    events = await collect(rig.submit())
    assert isinstance(error_of(events), errors.LeaseLost)
    assert len(decode.messages("submit_decode")) == 3


async def test_cancel_reaches_both_workers(make_rig) -> None:
    rig = await make_rig()
    prefill = await rig.join("p0", "prefill", hold_prefill=True)
    decode = await rig.join("d0", "decode")
    stream = rig.submit()
    await prefill.until(lambda: bool(prefill.open and decode.open))
    stream.cancel("the client closed its connection")
    stream.cancel("again")
    assert isinstance(error_of(await collect(stream)), errors.ClientGone)
    await prefill.until(lambda: not prefill.open and not decode.open)
    assert prefill.kinds().count("cancel") == decode.kinds().count("cancel") == 1


async def test_stop_early_finishes_and_cancels(make_rig) -> None:
    rig = await make_rig()
    decode = await rig.join("d0", "decode", step_s=0.01)
    stream = rig.submit(max_tokens=1000)
    events = []
    async for event in stream:
        events.append(event)
        if isinstance(event, Tokens):
            stream.stop_early()
    assert finished(events).reason is FinishReason.STOP
    await decode.until(lambda: not decode.open)


async def test_deadline_cancels_both_and_fails(make_rig) -> None:
    rig = await make_rig()
    prefill = await rig.join("p0", "prefill")
    decode = await rig.join("d0", "decode", hold_lease=True)
    events = await collect(rig.submit(deadline_s=3.0))
    assert isinstance(error_of(events), errors.DeadlineExceeded)
    assert tokens_of(events) == answer(PROMPT, 1)
    await prefill.until(lambda: not prefill.open and not decode.open)


async def test_requests_wait_for_a_worker_and_the_line_is_bounded(make_rig) -> None:
    rig = await make_rig(max_queue=2)
    first, second = rig.submit(), rig.submit(request_id="req-2")
    with pytest.raises(errors.QueueFull) as refused:
        rig.submit()
    assert refused.value.retry_after_s >= 1
    assert rig.metric("num_requests_waiting") == 2
    assert not rig.core.service.health().ready
    await rig.join("d0", "decode")
    assert rig.core.service.health().ready
    events = await collect(first)
    assert events[0] == Queued(1, None)
    assert (await collect(second))[0] == Queued(2, None)
    assert finished(events).stats.queue_s > 0
    assert rig.metric("num_requests_waiting") == 0


async def test_nobody_comes_within_the_queue_timeout(make_rig) -> None:
    rig = await make_rig(queue_timeout_s=0.1)
    error = error_of(await collect(rig.submit()))
    assert isinstance(error, errors.NoCapacity)
    assert error.retry_after_s >= 1
    assert rig.core.service._placing.check_room() is None


async def test_a_full_worker_leaves_the_rest_in_line_until_it_reports_room(make_rig) -> None:
    rig = await make_rig()
    decode = await rig.join("d0", "decode", step_s=0.02)
    decode.report(free_blocks=0, waiting=8)
    (link,) = rig.core.registry.links
    await decode.until(lambda: link.load.waiting == 8)
    stream = rig.submit()
    await asyncio.sleep(0.1)
    assert decode.kinds() == []
    decode.report(free_blocks=1000, waiting=0)
    events = await collect(stream)
    assert isinstance(events[0], Queued)
    assert tokens_of(events) == answer(PROMPT, 8)


async def test_forced_disaggregation_without_prefill_worker_has_no_place(make_rig) -> None:
    rig = await make_rig(queue_timeout_s=1.5)
    await rig.join("d0", "decode")
    forced = rig.submit(force_path=PathKind.DISAGGREGATED)
    # It does not stand in the way of those that can run.
    assert finished(await collect(rig.submit(request_id="req-2")))
    assert isinstance(error_of(await collect(forced)), errors.NoCapacity)


async def test_drain_lets_streams_end_and_leaves_the_workers_to_their_owner(make_rig) -> None:
    rig = await make_rig()
    decode = await rig.join("d0", "decode", step_s=0.02)
    stream = rig.submit()
    draining = asyncio.create_task(rig.core.drain())
    await asyncio.sleep(0)
    with pytest.raises(errors.Draining):
        rig.submit()
    assert rig.core.service.health().phase == "draining"
    assert tokens_of(await collect(stream)) == answer(PROMPT, 8)
    await draining
    assert "drain" not in decode.kinds()


async def test_drain_fails_what_outlives_the_grace(make_rig) -> None:
    rig = await make_rig(drain_grace_s=0.1)
    decode = await rig.join("d0", "decode", step_s=0.05)
    stream = rig.submit(max_tokens=1000)
    await rig.core.drain()
    assert isinstance(error_of(await collect(stream)), errors.Draining)
    await decode.until(lambda: not decode.open)


async def test_slow_reader_gets_everything_in_one_go(make_rig) -> None:
    rig = await make_rig()
    decode = await rig.join("d0", "decode")
    stream = rig.submit(max_tokens=200)
    await decode.until(lambda: rig.metric("request_success_total", finished_reason="length") == 1)
    events = await collect(stream)
    assert sum(isinstance(e, Tokens) for e in events) == 1
    assert tokens_of(events) == answer(PROMPT, 200)


async def test_one_trace_with_one_root(make_rig) -> None:
    rig = await make_rig()
    await rig.join("p0", "prefill")
    dying = await rig.join("d0", "decode", pause_at_index=3)
    caller = TraceContext.new()
    stream = rig.submit(traceparent=caller.traceparent)
    await read_tokens(stream, 3)
    await rig.join("d1", "decode")
    dying.die()
    finished(await collect(stream))

    spans = {s.name: s for s in rig.spans.get_finished_spans()}
    names = sorted(s.name for s in rig.spans.get_finished_spans())
    assert names == ["chat demo", "place", "place", "queue"]
    root = spans["chat demo"]
    assert {s.context.trace_id for s in spans.values()} == {root.context.trace_id}
    assert f"{root.context.trace_id:032x}" == stream.trace_id == caller.trace_id.hex()
    assert root.parent.span_id == int.from_bytes(caller.span_id, "big")
    children = [s for s in rig.spans.get_finished_spans() if s is not root]
    assert {s.parent.span_id for s in children} == {root.context.span_id}
    assert [e.name for e in root.events] == ["replay"]
    attributes = dict(root.attributes)
    assert attributes["kvrelay.path.reason"] == "replay"
    assert attributes["kvrelay.decode_worker"] == "d1"
    assert attributes["gen_ai.usage.output_tokens"] == 8
    sent = dying.messages("submit_decode")[0].sequence.traceparent
    assert TraceContext.parse(sent).span_id == root.context.span_id.to_bytes(8, "big")


async def test_failure_is_on_the_root_span(make_rig) -> None:
    rig = await make_rig(queue_timeout_s=0.05)
    await collect(rig.submit())
    root = next(s for s in rig.spans.get_finished_spans() if s.name == "chat demo")
    assert root.attributes["error.type"] == "no_capacity"
    assert root.status.status_code.name == "ERROR"
    assert sorted(s.name for s in rig.spans.get_finished_spans()) == ["chat demo", "queue"]


async def test_worker_counters_outlive_the_worker(make_rig) -> None:
    rig = await make_rig()
    decode = await rig.join("d0", "decode")
    decode.report(prefix_cache_hits=5, corrupt_frames=1, used_blocks=250, free_blocks=750)
    await decode.until(lambda: rig.metric("kv_corrupt_frames_total") == 1)
    assert rig.metric("kv_cache_usage_perc", worker="d0") == 0.25
    assert rig.metric("workers", role="decode", state="ready") == 1
    decode.die()
    await decode.until(lambda: rig.metric("workers", role="decode", state="ready") == 0)
    assert rig.metric("prefix_cache_hits_total") == 5
    assert (
        rig.core.metrics.registry.get_sample_value(
            "kvrelay_kv_cache_usage_perc",
            {"worker": "d0"},
        )
        is None
    )


async def test_a_defect_of_ours_is_one_typed_failure(make_rig, monkeypatch, caplog) -> None:
    rig = await make_rig()
    decode = await rig.join("d0", "decode")

    def defect(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret prompt")

    monkeypatch.setattr(rig.core.metrics, "placed", defect)
    error = error_of(await collect(rig.submit()))
    assert isinstance(error, errors.InternalError)
    assert "secret" not in error.message
    assert "req-1" in error.message
    await decode.until(lambda: not decode.open)
