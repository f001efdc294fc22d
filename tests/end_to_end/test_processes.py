"""What a user sees of `kvrelay up`: answers, killed workers, lost clients, one trace per request."""

import asyncio
import contextlib
import json
import random
import re
import signal
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from server_process import Server, TraceSink, running_server
from tiny_models import reference_chat, tiny_model

from kvrelay import AsyncClient, Client, Finished, KvrelayClientError, TextDelta

MODEL = "tiny"
LONG = 400
"""Tokens of an answer that is long enough to be killed in its middle."""
QUESTION = [{"role": "user", "content": "the answer in another one"}]


@pytest.fixture(scope="module")
def sink():
    collector = TraceSink()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def server(sink):
    shm = set(Path("/dev/shm").iterdir())
    flags = ("--served-model-name", MODEL, "--kv-memory", "16MiB", "--dtype", "float32")
    flags += ("--queue-timeout", "120")
    with running_server(tiny_model("llama3"), *flags, environment=sink.environment) as running:
        yield running
        processes = psutil.Process(running.process.pid).children(recursive=True)
    _gone, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, f"left behind: {alive}"
    # Other processes of this machine leave theirs; each is named after its own.
    running.pids.update(process.pid for process in processes)
    left = {path.name for path in set(Path("/dev/shm").iterdir()) - shm}
    assert not [name for name in left if running.pids & set(map(int, re.findall(r"\d+", name)))]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as opened:
        yield opened


def expected_text(max_tokens: int, question: str = QUESTION[0]["content"]) -> tuple[list[int], str]:
    """Prompt tokens and the text transformers would answer."""
    return reference_chat(tiny_model("llama3"), question, max_tokens)


def test_the_openai_client_gets_the_answer_of_transformers(server, client):
    prompt, text = expected_text(20)
    assert [m.id for m in client.models.list()] == [MODEL]
    options = {"model": MODEL, "messages": QUESTION, "max_tokens": 20, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), 20)
    chunks = list(
        client.chat.completions.create(
            **options,
            stream=True,
            stream_options={"include_usage": True},
        ),
    )
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == text
    assert chunks[-1].usage.completion_tokens == 20


def test_the_sdk_streams_events_and_timings(server):
    _, text = expected_text(20)
    with (
        Client(base_url=server.url) as client,
        client.stream(QUESTION, max_tokens=20, temperature=0, extra={"ignore_eos": True}) as stream,
    ):
        events = list(stream)
        assert "".join(e.text for e in events if isinstance(e, TextDelta)) == text
        assert any(isinstance(e, Finished) for e in events)
        timings = stream.timings
        assert timings.path == "disaggregated"
        assert (timings.prefill_worker, timings.decode_worker) == ("prefill-0", "decode-0")
        assert timings.kv_bytes > 0
        assert timings.kv_transport.startswith("tcp")
        assert len(stream.trace_id) == 32


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_both_pools(server, stream):
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 1500, "temperature": 0}
    body |= {"stream": stream, "ignore_eos": True}

    def leave() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            if stream:
                with http.stream("POST", "/v1/chat/completions", json=body) as response:
                    next(response.iter_lines())
            else:
                with contextlib.suppress(httpx.ReadTimeout):
                    http.post("/v1/chat/completions", json=body, timeout=0.1)

    # A client that stood still for as long as the whole answer took has left nothing in its middle.
    before, tries = _cancelled(server), 10
    while _cancelled(server) == before:
        assert tries, "every answer was whole before its client had left"
        tries -= 1
        leave()
        server.wait_idle()


def _cancelled(server: Server) -> float:
    """Requests that ended because their client had gone."""
    metrics = httpx.get(f"{server.url}/metrics").text
    found = re.search(
        r'kvrelay_request_failure_total\{[^}]*"client_disconnected"[^}]*\} (\S+)', metrics
    )
    return float(found[1]) if found else 0.0


async def test_64_streams_over_http_half_of_them_left_at_random_points(server):
    rng = random.Random(3)
    questions = [f"{n} " + "the other one " * rng.choice([0, 1, 5, 12, 30]) for n in range(64)]
    kept = set(rng.sample(range(64), 32))
    expected = {n: expected_text(16, questions[n])[1] for n in kept}

    async def ask(client: AsyncClient, n: int) -> str | None:
        options = {"max_tokens": 16 if n in kept else 600, "temperature": 0}
        async with client.stream(questions[n], **options, extra={"ignore_eos": True}) as stream:
            if n in kept:
                return (await stream.final()).text
            leave_after = rng.random() * 3
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(leave_after):
                    async for _ in stream:
                        pass
        return None

    async with AsyncClient(base_url=server.url) as client:
        answers = await asyncio.gather(*(ask(client, n) for n in range(64)))
    assert {n: answers[n] for n in kept} == expected
    await asyncio.to_thread(server.wait_idle)
    for worker in server.workers():
        assert worker["free_blocks"] + worker["cached_blocks"] == worker["total_blocks"]


def _stream_in_thread(server: Server, results: dict, max_tokens: int = LONG) -> threading.Thread:
    """Stream one answer; record its text and how it ended."""

    def work() -> None:
        with Client(base_url=server.url) as client:
            try:
                with client.stream(
                    QUESTION,
                    max_tokens=max_tokens,
                    temperature=0,
                    extra={"ignore_eos": True},
                ) as stream:
                    results["trace_id"] = stream.trace_id
                    for event in stream:
                        if isinstance(event, TextDelta):
                            results["text"] = event.snapshot
                            results["started"].set()
                    results["end"] = stream.final().finish_reason
            except KvrelayClientError as error:
                results["end"] = error

    results["started"] = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_kill_9_mid_stream_ends_in_the_answer_or_a_typed_error(server, sink, victim):
    server.wait_for_workers("prefill-0", "decode-0")
    before = server.worker_pid(victim)
    streams: list[dict] = [{} for _ in range(4)]
    threads = [_stream_in_thread(server, results) for results in streams]
    for results in streams:
        assert results["started"].wait(60)
    server.kill(victim)
    for thread in threads:
        thread.join(120)
    _, text = expected_text(LONG)
    for results in streams:
        if results["end"] == "length":
            assert results["text"] == text
            continue
        assert victim == "decode-0", results["end"]
        assert isinstance(results["end"], KvrelayClientError)
        assert results["end"].code == "worker_lost"
        assert text.startswith(results["text"])
    server.wait_for_workers("prefill-0", "decode-0")
    assert server.worker_pid(victim) != before
    with Client(base_url=server.url) as client:
        answer = client.chat(QUESTION, max_tokens=20, temperature=0, extra={"ignore_eos": True})
    assert answer.text == expected_text(20)[1]
    assert answer.timings.path == "disaggregated"
    server.wait_idle()
    for results in streams:
        # Spans the victim had not exported are gone with it; what is there hangs together.
        _check_trace(sink, results["trace_id"], {"queue", "place"})


def _check_trace(sink: TraceSink, trace_id: str, names: set[str]) -> dict[str, str]:
    """One root and no orphan; returns the service of each span name."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        spans = sink.trace(trace_id)
        if names <= {span.name for _, span in spans} and _roots(spans):
            break
        time.sleep(0.1)
    time.sleep(0.7)  # one export interval: nothing else may come without a parent
    spans = sink.trace(trace_id)
    found = {span.name for _, span in spans}
    assert names <= found, found
    assert len(_roots(spans)) == 1
    ids = {span.span_id for _, span in spans}
    orphans = [s.name for _, s in spans if s.parent_span_id and s.parent_span_id not in ids]
    assert not orphans, orphans
    (root,) = _roots(spans)
    for _, span in spans:
        assert span.end_time_unix_nano >= span.start_time_unix_nano
        assert span.start_time_unix_nano >= root.start_time_unix_nano - 1_000_000
    text = " ".join(str(span) for _, span in spans)
    assert "another one" not in text, "prompts stay out of spans"
    return {span.name: service for service, span in spans}


def _roots(spans):
    return [span for _, span in spans if not span.parent_span_id]


def test_one_trace_covers_both_pools(server, sink):
    with Client(base_url=server.url) as client:
        answer = client.chat(QUESTION, max_tokens=5, temperature=0, extra={"ignore_eos": True})
    expected = {"queue", "place", "prefill", "kv_transfer", "decode"}
    services = _check_trace(sink, answer.trace_id, expected)
    assert services["prefill"] == "kvrelay-prefill"
    assert services["kv_transfer"] == services["decode"] == "kvrelay-decode"


def test_the_callers_context_is_the_parent_of_ours(server, sink):
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 3}
    headers = {"traceparent": f"00-{trace_id}-{parent}-01"}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers)
    assert response.headers["x-trace-id"] == trace_id
    server.wait(lambda: any(s.name == "decode" for _, s in sink.trace(trace_id)))
    server.wait(lambda: any(s.parent_span_id.hex() == parent for _, s in sink.trace(trace_id)))


def test_without_a_prefill_worker_the_answer_is_local_and_its_trace_whole(server, sink):
    pid = server.worker_pid("prefill-0")
    psutil.Process(pid).suspend()  # its stream goes silent: the router gives it up by heartbeat
    try:
        server.wait(lambda: {w["name"] for w in server.workers()} == {"decode-0"})
        with Client(base_url=server.url) as client:
            answer = client.chat(QUESTION, max_tokens=20, temperature=0, extra={"ignore_eos": True})
        assert answer.text == expected_text(20)[1]
        assert (answer.timings.path, answer.timings.reason) == ("local", "no_prefill_worker")
        services = _check_trace(sink, answer.trace_id, {"queue", "place", "prefill", "decode"})
        assert services["prefill"] == "kvrelay-decode"
    finally:
        psutil.Process(pid).resume()
    server.wait_for_workers("prefill-0", "decode-0")
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'path="local",reason="no_prefill_worker"' in metrics


def test_two_interrupts_stop_at_once(tmp_path):
    model = tiny_model("llama3", max_position_embeddings=20_000)
    with running_server(model, "--served-model-name", MODEL) as server:
        results: dict = {}
        thread = _stream_in_thread(server, results, max_tokens=19_000)
        assert results["started"].wait(60)
        children = psutil.Process(server.process.pid).children(recursive=True)
        # Nobody can finish the answer, so nothing but the second interrupt ends the stack.
        psutil.Process(server.worker_pid("decode-0")).suspend()
        server.process.send_signal(signal.SIGINT)
        server.wait(lambda: "draining" in server.log.read_text())
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 130
        thread.join(60)
        assert not isinstance(results["end"], str), "cut off, and said so"
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)


def test_the_wire_has_no_other_frames_for_ordinary_clients(server):
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert {json.loads(line[6:])["object"] for line in lines[:-1]} == {"chat.completion.chunk"}
