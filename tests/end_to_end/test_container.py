"""`kvrelay serve` as a platform runs it: its variables, its probes, its requests, its SIGTERM."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest
from ports import free_ports
from server_process import Server, started
from tiny_models import reference_chat, tiny_model

QUESTION = "the answer in another one"
BODY = {
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
}
LONG = BODY | {"max_tokens": 400, "stream": True}


def container(*flags: str, **environment: str):
    """A container at a port of its own."""
    (port,) = free_ports(1)
    settings = {
        "PORT": str(port),
        "KVRELAY_MODEL": str(tiny_model("llama3")),
        "KVRELAY_SERVED_MODEL_NAME": "tiny",
        "KVRELAY_KV_MEMORY": "16MiB",
        "KVRELAY_DTYPE": "float32",
        "KVRELAY_THREADS": "1",
        "UCX_TLS": "no_such_transport",
    }
    return started(["serve", *flags], port, settings | environment)


def ping(server: Server) -> int:
    return httpx.get(f"{server.url}/ping").status_code


def terminate(server: Server) -> int:
    """SIGTERM; the exit code."""
    server.process.send_signal(signal.SIGTERM)
    return server.process.wait(100)


def expected() -> str:
    return reference_chat(tiny_model("llama3"), QUESTION, BODY["max_tokens"])[1]


@pytest.fixture(scope="module")
def cloud_run():
    with container(K_SERVICE="llm") as server:
        server.wait_ready()
        yield server
        assert terminate(server) == 0, server.log.read_text()


def test_it_says_first_that_there_is_one_pool(cloud_run):
    first = cloud_run.log.read_text().splitlines()[0]
    assert first.startswith("kvrelay serve on Cloud Run: one aggregated pool, no disaggregation")
    assert [worker["role"] for worker in cloud_run.workers()] == ["decode"]


def test_its_worker_needs_no_ucx_and_opens_no_port_of_it(cloud_run):
    worker = psutil.Process(cloud_run.worker_pid("decode-0"))
    assert [c for c in worker.net_connections() if c.status == psutil.CONN_LISTEN] == []


def test_it_answers_chat_and_completion_at_one_route(cloud_run):
    assert ping(cloud_run) == 200
    reply = httpx.post(f"{cloud_run.url}/invocations", json=BODY, timeout=60)
    assert reply.json()["choices"][0]["message"]["content"] == expected()
    assert reply.headers["x-kvrelay-path"] == "local; reason=no_prefill_worker"
    reply = httpx.post(f"{cloud_run.url}/invocations", json={"prompt": "the"}, timeout=60)
    assert reply.json()["object"] == "text_completion"


def test_a_stream_of_invocations_is_chunked_events(cloud_run):
    url = f"{cloud_run.url}/invocations"
    with httpx.stream("POST", url, json=BODY | {"stream": True}, timeout=60) as reply:
        assert reply.headers["transfer-encoding"] == "chunked"
        assert reply.headers["content-type"].startswith("text/event-stream")
        frames = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
    assert frames.pop() == "[DONE]"
    deltas = [json.loads(frame)["choices"][0]["delta"] for frame in frames]
    assert "".join(delta.get("content") or "" for delta in deltas) == expected()


def test_the_openai_client_needs_nothing_special(cloud_run):
    with openai.OpenAI(base_url=f"{cloud_run.url}/v1", api_key="x", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="tiny",
            messages=BODY["messages"],
            max_tokens=12,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
    assert answer.choices[0].message.content == expected()


class OpenStream:
    """An answer under way, read by a thread of its own."""

    def __init__(self, server: Server, body: dict[str, object]) -> None:
        self._url, self._body = f"{server.url}/invocations", body
        self._lines: list[str] = []
        self.begun = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=100) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    self._lines.append(line[6:])
                    self.begun.set()

    def frames(self) -> list[str]:
        """All of it, once it has ended."""
        self._thread.join(100)
        assert not self._thread.is_alive()
        return self._lines


def test_told_to_stop_while_it_starts_it_ends_well():
    with container() as server:
        server.wait(lambda: "one aggregated pool" in server.log.read_text())
        assert terminate(server) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()


@contextlib.contextmanager
def held_stream(server: Server) -> Iterator[OpenStream]:
    """A stream that is under way for as long as the block lasts: its worker is stopped meanwhile."""
    worker = server.worker_pid("decode-0")
    stream = OpenStream(server, LONG)
    assert stream.begun.wait(60)
    os.kill(worker, signal.SIGSTOP)
    try:
        yield stream
    finally:
        os.kill(worker, signal.SIGCONT)


def test_runpod_is_told_of_the_start_and_sigterm_cuts_no_stream_off():
    # A worker that is silent for as long as a test may take is not lost.
    with container("--drain-grace=90", "--heartbeat=10", RUNPOD_POD_ID="x") as server:
        server.wait(lambda: ping(server) == 204)
        server.wait_ready()
        assert ping(server) == 200
        with held_stream(server) as stream:
            server.process.send_signal(signal.SIGTERM)
            server.wait(lambda: ping(server) == 503)
            late = httpx.post(f"{server.url}/invocations", json=BODY)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "server_draining")
        *chunks, done = stream.frames()
        assert server.process.wait(100) == 0, server.log.read_text()
    assert done == "[DONE]"
    assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "length"


def test_a_stream_that_outlasts_the_grace_ends_in_an_error_and_the_container_well():
    with container("--drain-grace=0", "--heartbeat=10") as server:
        server.wait_ready()
        with held_stream(server) as stream:
            server.process.send_signal(signal.SIGTERM)
            *_, last, done = stream.frames()
        assert server.process.wait(100) == 0, server.log.read_text()
    assert done == "[DONE]"
    assert json.loads(last)["error"]["code"] == "server_draining"
