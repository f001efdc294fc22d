"""Bytes of a stream, and what happens when a client leaves or stops reading."""

import asyncio
import contextlib
import json
import socket

import httpx
import pytest
from scripted_service import LOCAL, PATH, Gate, Wait, answer, stats

from kvrelay_protocol.errors import WorkerLost
from kvrelay_router.http.answer import Patience
from kvrelay_router.requests.types import (
    Failed,
    Finished,
    FinishReason,
    Placed,
    Queued,
    Resumed,
    Started,
    Tokens,
)

BODY = {"model": "org/tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
SDK = {"x-stream-protocol": "1"}


@pytest.fixture
def ids(model):
    return tuple(model.tokenizer.encode("Hello there", add_special_tokens=False))


def frames(text):
    assert text.endswith("\n\n")
    return text.removesuffix("\n\n").split("\n\n")


def post(server, headers=None, **change):
    return httpx.post(
        f"{server.url}/v1/chat/completions", json={**BODY, **change}, headers=headers, timeout=60
    )


def post_and_open(server, gate, signs, sign=": ping", headers=None, **change):
    """Text of a stream whose script waits at the gate until this many signs of life came."""
    request = {"json": {**BODY, **change}, "headers": headers, "timeout": 60}
    text = ""
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", **request) as reply:
        for piece in reply.iter_text():
            text += piece
            if text.count(sign) >= signs:
                gate.open()
    return reply, text


def test_an_ordinary_client_sees_only_data_frames(serve, service, ids):
    service.script = answer(ids)
    reply = post(serve(), stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    seen = frames(reply.text)
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in seen)
    assert seen.count("data: [DONE]") == 1
    assert seen[-1] == "data: [DONE]"
    chunks = [json.loads(frame[6:]) for frame in seen[:-1]]
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_text_that_breaks_line_readers_is_escaped(serve, service, model):
    text = 'a\u2028b\u0085c"\\\r\n\x00🙂'
    service.script = answer(model.tokenizer.encode(text, add_special_tokens=False))
    reply = post(serve())
    lines = [line for line in reply.text.splitlines() if line.startswith("data: {")]
    got = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines)
    assert got == text


def test_local_path_and_reason_are_in_the_head(serve, service, ids):
    service.script = answer(ids, path=LOCAL)
    server = serve()
    assert post(server).headers["x-kvrelay-path"] == "local; reason=short_prompt"
    assert post(server, stream=False).headers["x-kvrelay-path"] == "local; reason=short_prompt"


def test_a_long_queue_sends_the_head_and_signs_of_life(serve, service, ids, quick):
    gate = Gate()
    service.script = lambda request: [
        Queued(3, 1.0), gate, Queued(1, None), Wait(0.1), Placed(PATH, 0), Started(0),
        Tokens(ids), Finished(FinishReason.STOP, stats(request, len(ids))),
    ]  # fmt: skip
    reply, text = post_and_open(serve(patience=quick), gate, signs=2)
    assert reply.headers["x-kvrelay-path"] == "pending"
    seen = frames(text)
    assert seen[0] == seen[1] == ": ping"
    assert "event:" not in text
    assert "Hello there" in text


def test_a_failure_after_a_pending_head_is_an_error_frame(serve, service, quick):
    gate = Gate()
    service.script = lambda _: [Queued(3, 1.0), gate, Failed(WorkerLost("gone"))]
    server = serve(patience=quick)
    reply, text = post_and_open(server, gate, signs=1, headers={"x-request-id": "r-1"})
    assert reply.status_code == 200
    *_, error, done = frames(text)
    assert done == "data: [DONE]"
    assert json.loads(error[6:])["error"] == {
        "message": "gone (request id r-1)",
        "type": "server_error",
        "param": None,
        "code": "worker_lost",
    }


def test_sdk_streams_have_named_events(serve, service, ids, quick):
    gate = Gate()
    service.script = lambda request: [
        Queued(2, 0.5), gate, Placed(PATH, 0), Started(7), Tokens(ids[:1]),
        Resumed(0.4, 1), Tokens(ids[1:]), Finished(FinishReason.STOP, stats(request, len(ids))),
    ]  # fmt: skip
    options = {"headers": SDK, "stream_options": {"include_usage": True}}
    _, text = post_and_open(serve(patience=quick), gate, 1, "event: ping", **options)
    events = []
    for frame in frames(text):
        name, _, data = frame.rpartition("data: ")
        events.append((name.removeprefix("event: ").strip(), data))
    named = {name: json.loads(data) for name, data in events if name}
    assert named["queued"] == {"position": 2, "eta_s": 0.5}
    assert named["ping"] == {}
    assert named["started"] == {
        "path": "disaggregated", "reason": "least_loaded", "prefill_worker": "prefill-0",
        "decode_worker": "decode-0", "cached_tokens": 7,
        "prompt_tokens": len(service.last.request.prompt_tokens),
    }  # fmt: skip
    assert named["resumed"] == {"gap_s": 0.4, "from_index": 1}
    assert set(named["timings"]) == {
        "queue_ms", "prefill_ms", "kv_transfer_ms", "kv_exposed_ms", "decode_ms",
        "time_to_first_token_ms", "tokens_per_second", "kv_bytes", "kv_transport", "kv_gbps", "cached_tokens", "path",
        "reason", "prefill_worker", "decode_worker", "replays",
    }  # fmt: skip
    assert [name for name, _ in events][-3:] == ["", "timings", ""]
    assert json.loads(events[-3][1])["usage"]["completion_tokens"] == len(ids)
    assert "\n: ping" not in text


def test_continuous_usage_is_in_every_chunk(serve, service, ids):
    service.script = answer(ids, pause_s=0.002)
    options = {"include_usage": True, "continuous_usage_stats": True}
    reply = post(serve(), stream_options=options)
    counts = [
        json.loads(frame[6:])["usage"]["completion_tokens"]
        for frame in frames(reply.text)[:-1]
        if json.loads(frame[6:]).get("usage")
    ]
    assert counts == sorted(counts)
    assert counts[-1] == len(ids)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("started", [True, False], ids=["answering", "queued"])
def test_a_client_that_leaves_cancels_at_once(serve, service, ids, until, stream, started):
    begin = [Placed(PATH, 0), Started(0), Tokens(ids)] if started else [Queued(1, None)]
    service.script = lambda _: [*begin, Wait(None)]
    # No sign of life is sent whose loss would show that the client is gone.
    server = serve(patience=Patience(ping_s=600))
    raw = json.dumps({**BODY, "stream": stream, "n": 2}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)
        )
        until(lambda: len(service.streams) == 2)
        if stream and started:
            connection.recv(100)
        assert not service.last.cancelled
    until(lambda: all(s.cancelled for s in service.streams))
    assert service.last.cancelled[0] == "client disconnected"


def test_a_client_that_reads_nothing_is_dropped_and_cancelled(serve, service, model, until, quick):
    chunk = tuple(model.tokenizer.encode("word " * 8000, add_special_tokens=False))
    service.script = lambda _: [
        Placed(PATH, 0), *[step for _ in range(500) for step in (Tokens(chunk), Wait(0.001))],
        Wait(None),
    ]  # fmt: skip
    server = serve(patience=quick)
    raw = json.dumps(BODY).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)
        )
        until(lambda: service.streams and service.last.cancelled)
        # Cut, not ended: what a late reader finds is no complete answer.
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
    assert received.startswith(b"HTTP/1.1 200")
    assert not received.endswith(b"0\r\n\r\n")
    assert b"[DONE]" not in received


def test_text_that_piles_up_leaves_as_one_delta(serve, service, model, ids):
    # All tokens are there before the writer runs once.
    service.script = answer(ids)
    reply = post(serve())
    assert sum('"content":"' in frame for frame in frames(reply.text)) == 2  # opening, text


async def test_the_edge_works_without_our_server(make_app, service, ids):
    # Any ASGI server will do; only the abort of stuck connections needs ours.
    service.script = answer(ids)
    transport = httpx.ASGITransport(make_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        reply = await client.post("/v1/chat/completions", json=BODY)
    assert reply.text.endswith("data: [DONE]\n\n")
    await asyncio.sleep(0)
    assert service.last.ended.is_set()
