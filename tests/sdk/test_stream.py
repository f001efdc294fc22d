import json

import pytest

from kvrelay import (
    AsyncClient,
    Client,
    Finished,
    InvalidResponseError,
    Queued,
    Resumed,
    Started,
    StreamInterrupted,
    TextDelta,
    UnknownEvent,
    Usage,
)
from kvrelay.testing import (
    FakeServer,
    delay,
    drop,
    end,
    error,
    frame,
    ping,
    raw,
    status,
    timings,
)

STARTED = Started("disaggregated", "long_prompt", "prefill-0", "decode-1", 4, 12)


def test_events_arrive_typed_and_in_order(ask):
    script = [
        Queued(3, 1.5),
        STARTED,
        ping(),
        TextDelta("hé"),
        Resumed(0.25, 1),
        TextDelta("llo"),
        Finished("stop"),
        Usage(12, 2, 14, 4),
        timings(queue_ms=2.0),
    ]
    with FakeServer(script) as server:
        asked = ask(server)
    assert asked.events == [
        Queued(3, 1.5),
        STARTED,
        TextDelta("hé", "hé"),
        Resumed(0.25, 1),
        TextDelta("llo", "héllo"),
        Finished("stop"),
        Usage(12, 2, 14, 4),
    ]
    assert asked.final.text == "héllo"
    assert asked.final.usage == Usage(12, 2, 14, 4)
    assert asked.final.finish_reason == "stop"
    assert (asked.final.request_id, asked.final.trace_id) == ("req_1", f"{1:032x}")
    assert asked.stream.snapshot == "héllo"
    assert asked.stream.request_id == "req_1"


def test_request_is_what_the_protocol_says(ask, server):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "\ud800é"}]
    ask(
        server,
        messages,
        client={"api_key": "sk-1"},
        max_tokens=5,
        temperature=0.0,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        seed=7,
        stop=("\n", "END"),
        extra={"priority": 1, "top_p": 0.5},
        idempotency_key="mine",
    )
    (request,) = server.requests
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.json == {
        "model": "fake",
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["\n", "END"],
        "priority": 1,
    }
    assert request.headers["authorization"] == "Bearer sk-1"
    assert request.headers["x-stream-protocol"] == "1"
    assert request.headers["idempotency-key"] == "mine"
    assert request.headers["accept"] == "text/event-stream"
    assert "traceparent" not in request.headers


def test_timings_join_what_server_and_client_measured(ask):
    measured = {
        "queue_ms": 1.0,
        "prefill_ms": 20.0,
        "kv_transfer_ms": 3.0,
        "kv_exposed_ms": 0.5,
        "decode_ms": 40.0,
        "time_to_first_token_ms": 25.0,
        "tokens_per_second": 50.0,
        "kv_bytes": 4096,
        "kv_transport": "shm",
        "kv_gbps": 1.5,
        "cached_tokens": 4,
        "path": "disaggregated",
        "reason": "long_prompt",
        "prefill_worker": "prefill-0",
        "decode_worker": "decode-1",
        "replays": 1,
    }
    script = [
        STARTED,
        delay(0.1),
        TextDelta("a"),
        delay(0.05),
        TextDelta("b"),
        Finished("stop"),
        timings(**measured),
    ]
    with FakeServer(script) as server:
        found = ask(server).final.timings
    assert 100 <= found.client_ttft_ms < 2000
    assert 40 <= found.client_itl_p50_ms <= found.client_itl_p95_ms < 2000
    assert found.retries == 0
    for name, value in measured.items():
        if name not in {"time_to_first_token_ms", "tokens_per_second"}:
            assert getattr(found, name) == value
    assert found.tokens_per_s == 50.0


def test_timings_without_the_servers_frame_come_from_what_was_seen(ask):
    script = [
        STARTED,
        TextDelta("a"),
        delay(0.05),
        TextDelta("b"),
        Finished("stop"),
        Usage(12, 2, 14),
    ]
    with FakeServer(script) as server:
        found = ask(server).final.timings
    assert (found.path, found.reason) == ("disaggregated", "long_prompt")
    assert (found.prefill_worker, found.decode_worker) == ("prefill-0", "decode-1")
    assert found.cached_tokens == 4
    assert 0 < found.tokens_per_s <= 25
    assert found.queue_ms is None


def test_ttft_counts_from_sending_not_from_the_response_head(ask):
    with FakeServer() as server:
        server.queue(status(503), status(503))
        asked = ask(server)
    assert asked.final.timings.retries == 2
    assert asked.final.timings.client_ttft_ms > 5  # two pauses of at least 5 ms


def test_unknown_events_are_kept(ask):
    cold = UnknownEvent("cold_start", '{"phase": "pull"}')
    script = [
        cold,
        UnknownEvent("queued", "not json"),
        UnknownEvent("queued", '{"position": "third"}'),
        frame({"object": "novelty"}),
        frame({"choices": []}, "message"),  # the name that the specification gives unnamed frames
        TextDelta("x"),
        Finished("stop"),
    ]
    with FakeServer(script) as server:
        asked = ask(server)
    kept = [event for event in asked.events if isinstance(event, UnknownEvent)]
    assert kept[:3] == script[:3]
    assert len(kept) == 4
    assert kept[0].json() == {"phase": "pull"}
    assert kept[3].json() == {"object": "novelty"}
    assert asked.final.text == "x"


def test_deltas_without_a_type_of_their_own_are_kept_beside_the_text(ask):
    def chunk(delta, index=0):
        return frame({"choices": [{"index": index, "delta": delta, "finish_reason": None}]})

    script = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": None, "reasoning": "hm"}),
        chunk({"content": "second answer"}, index=1),
        chunk({"content": "a"}),
        Finished("stop"),
    ]
    with FakeServer(script) as server:
        asked = ask(server)
    assert [type(event) for event in asked.events] == [
        UnknownEvent,
        UnknownEvent,
        TextDelta,
        Finished,
    ]
    assert asked.final.text == "a"


@pytest.mark.parametrize("ending", [[end()], [drop()], []], ids=["eof", "cut", "done"])
def test_an_end_without_a_terminal_event_is_no_success(ask, ending):
    with FakeServer([TextDelta("par"), TextDelta("tial"), *ending]) as server:
        asked = ask(server)
    assert isinstance(asked.error, StreamInterrupted)
    assert asked.error.partial == "partial"
    assert asked.error.code is None
    assert asked.error.request_id == "req_1"
    assert "req_1" in str(asked.error)
    assert len(server.requests) == 1


@pytest.mark.parametrize("ending", [end(), drop()], ids=["eof", "cut"])
def test_a_lost_epilogue_does_not_spoil_a_complete_answer(ask, ending):
    with FakeServer([TextDelta("all"), Finished("length"), ending]) as server:
        asked = ask(server)
    assert asked.final.text == "all"
    assert asked.final.finish_reason == "length"
    assert asked.final.usage is None


@pytest.mark.parametrize(
    ("sent", "code", "reason"),
    [
        (error("decode-1 died", code="worker_lost", param="p"), "worker_lost", "decode-1 died"),
        (frame({"error": "plain"}), None, "plain"),
        (frame({"error": {}}), None, "without a message"),
        (frame({"object": "error", "message": "flat", "code": 400}), "400", "flat"),
        (frame({"error": {"message": "named", "code": "c"}}, "error"), "c", "named"),
        (frame("{broken"), None, "not a JSON object"),
        (frame([1]), None, "not a JSON object"),
    ],
    ids=["nested", "text", "empty", "flat", "named", "broken", "list"],
)
def test_an_error_frame_ends_the_stream_with_the_servers_code(ask, sent, code, reason):
    with FakeServer([TextDelta("so far"), sent]) as server:
        asked = ask(server)
    assert isinstance(asked.error, StreamInterrupted)
    assert (asked.error.code, asked.error.partial) == (code, "so far")
    assert reason in asked.error.reason
    assert len(server.requests) == 1


def test_frames_split_anywhere_are_put_together(ask):
    chunk = json.dumps(
        {"choices": [{"index": 0, "delta": {"content": "漢字😀"}}]}, ensure_ascii=False
    )
    data = f": hello\r\ndata: {chunk}\r\n\r\n".encode()
    with FakeServer(
        [*(raw(data[i : i + 1]) for i in range(len(data))), Finished("stop")]
    ) as server:
        assert ask(server).final.text == "漢字😀"


def test_no_model_means_the_first_one_listed_asked_once(server):
    with Client(server.base_url) as client:
        for _ in range(2):
            with client.stream("hello") as stream:
                stream.final()
    assert [request.path for request in server.requests] == [
        "/v1/models",
        "/v1/chat/completions",
        "/v1/chat/completions",
    ]
    assert server.chats()[0].json["model"] == "fake"


def test_the_default_model_is_looked_up_again_after_a_404(server, call):
    with Client(server.base_url) as client:
        client.chat("a")
        server.queue(status(404, "gone", code="model_not_found"))
        with pytest.raises(Exception, match="gone"):
            client.chat("b")
        client.chat("c")
    assert [request.path for request in server.requests].count("/v1/models") == 2


def test_a_server_without_models_is_named(ask):
    with FakeServer(models=()) as server:
        asked = ask(server, model=None)
    assert isinstance(asked.error, InvalidResponseError)
    assert "model=" in str(asked.error)


def test_a_success_that_is_no_event_stream_is_refused(ask, server):
    server.queue(status(200, body={"hello": "proxy"}))
    assert isinstance(ask(server).error, InvalidResponseError)


def test_text_stream_final_text_and_reading_on(server):
    with Client(server.base_url) as client:
        with client.stream("hello") as stream:
            assert next(stream.events) == Started("local", "fake", None, "decode-0", 0, 3)
            assert next(stream.text_stream) == "Hello"
            assert stream.snapshot == "Hello"
            assert stream.final_text() == "Hello world"
            assert list(stream) == []
        assert stream.final().usage == Usage(3, 2, 5)


async def test_text_stream_final_text_and_reading_on_async(server):
    async with AsyncClient(server.base_url) as client:
        async with client.stream("hello") as stream:
            assert await anext(stream.events) == Started("local", "fake", None, "decode-0", 0, 3)
            assert await anext(stream.text_stream) == "Hello"
            assert stream.snapshot == "Hello"
            assert await stream.final_text() == "Hello world"
            assert [event async for event in stream] == []
        assert (await stream.final()).usage == Usage(3, 2, 5)


def test_final_after_an_early_exit_says_what_is_missing(server):
    with Client(server.base_url) as client:
        with client.stream("hello") as stream:
            next(stream.text_stream)
        with pytest.raises(StreamInterrupted, match="left before the end") as caught:
            stream.final()
        assert caught.value.partial == "Hello"

        with client.stream("hello") as stream:
            for event in stream:
                if isinstance(event, Finished):
                    break
        assert stream.final().text == "Hello world"


def test_an_error_is_raised_again_by_final():
    with FakeServer([TextDelta("a"), end()]) as server, Client(server.base_url) as client:
        with client.stream("x") as stream:
            with pytest.raises(StreamInterrupted):
                list(stream)
            with pytest.raises(StreamInterrupted, match="ended before"):
                stream.final()
        assert list(stream) == []


def test_a_stream_manager_works_once(server):
    with Client(server.base_url) as client:
        manager = client.stream("hello")
        with manager as stream:
            stream.final()
        with pytest.raises(RuntimeError, match="once"), manager:
            pass


def test_connections_are_kept_between_streams(server):
    with Client(server.base_url) as client:
        for _ in range(3):
            with client.stream("hello") as stream:
                stream.final()
        assert len(client._http._transport._pool.connections) == 1


def test_one_client_serves_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    script = [TextDelta("a"), delay(0.01), TextDelta("b"), Finished("stop")]

    def one(_):
        with client.stream("hello", model="fake") as stream:
            return stream.final_text()

    with (
        FakeServer(script) as server,
        Client(server.base_url) as client,
        ThreadPoolExecutor(32) as pool,
    ):
        assert list(pool.map(one, range(128))) == ["ab"] * 128
