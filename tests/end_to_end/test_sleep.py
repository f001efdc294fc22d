"""`kvrelay up --min 0 --sleep`: real workers that sleep, wake up, are found asleep by a new router, and die asleep."""

import asyncio
import contextlib
import os
import signal

import httpx
import psutil
import pytest
from server_process import Server, running_server
from tiny_models import reference_chat, tiny_model

from kvrelay import AsyncClient, Client, ColdStart, TextDelta

MODEL = "tiny"
QUESTION = "the answer in another one"
LONG = " ".join(f"{n} the other one" for n in range(90))
OPTIONS = {"max_tokens": 12, "temperature": 0, "extra": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server():
    flags = ("--served-model-name", MODEL, "--kv-memory", "64MiB", "--dtype", "float32")
    sleepy = ("--min", "0", "--idle", "1", "--sleep", "10m", "--prefill", "0")
    with running_server(tiny_model("llama3"), *sleepy, *flags) as running:
        ask(running)
        yield running
        # The end of the stack finds it asleep: it ends by the signal, in time.
        running.wait(lambda: asleep(running))


@pytest.fixture
def sleeper(server):
    """Pid of the one worker, which sleeps."""
    server.wait(lambda: asleep(server))
    return worker_pid(server)


def asleep(server: Server) -> bool:
    return [(w["name"], w["asleep"]) for w in server.workers()] == [("decode-0", True)]


def worker_pid(server: Server) -> int | None:
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(argument.endswith("decode-0") for argument in child.cmdline()):
                return child.pid
    return None


def ask(server: Server, question: str = QUESTION) -> str:
    with Client(base_url=server.url) as client:
        return client.chat(question, **OPTIONS).text


def expected(question: str = QUESTION) -> str:
    return reference_chat(tiny_model("llama3"), question, OPTIONS["max_tokens"])[1]


def test_a_request_wakes_it_and_is_answered_as_ever(server, sleeper):
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'kvrelay_workers{role="decode",state="asleep"} 1.0' in metrics
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "phase": "asleep"}
    with Client(base_url=server.url) as client, client.stream(QUESTION, **OPTIONS) as stream:
        events = list(stream)
        assert stream.final().text == expected()
    starts = [event for event in events if isinstance(event, ColdStart)]
    assert [(start.pool, start.phase) for start in starts] == [("decode", "wake")]
    assert any(isinstance(event, TextDelta) for event in events)
    assert worker_pid(server) == sleeper


def test_a_cached_prefix_is_gone_with_its_memory_and_the_answer_is_the_same(server, sleeper):
    answers = []

    def again() -> int:
        with Client(base_url=server.url) as client:
            answers.append(client.chat(LONG, **OPTIONS))
        return answers[-1].usage.cached_tokens

    assert again() == 0
    server.wait(again)  # as a rule the first time, unless it falls asleep in between
    server.wait(lambda: asleep(server) and not server.workers()[0]["cached_blocks"])
    assert again() == 0
    assert {answer.text for answer in answers} == {expected(LONG)}
    assert worker_pid(server) == sleeper


def test_40_requests_wake_it_once_and_all_are_answered(server, sleeper):
    questions = [f"{n} the other one" for n in range(4)] * 10
    woken = server.log.read_text().count("awake after")

    async def ask_all() -> list[str]:
        async with AsyncClient(base_url=server.url) as client:
            answers = await asyncio.gather(*(client.chat(q, **OPTIONS) for q in questions))
        return [answer.text for answer in answers]

    assert asyncio.run(ask_all()) == [expected(question) for question in questions]
    assert server.log.read_text().count("awake after") == woken + 1
    assert worker_pid(server) == sleeper


def test_a_router_that_starts_again_finds_it_asleep(server, sleeper):
    server.kill("router")
    server.wait(lambda: asleep(server))
    assert worker_pid(server) == sleeper
    assert ask(server) == expected()
    assert worker_pid(server) == sleeper


def test_one_that_dies_asleep_is_gone_and_the_next_request_starts_another(server, sleeper):
    os.kill(sleeper, signal.SIGKILL)
    server.wait(lambda: worker_pid(server) is None and server.workers() == [])
    with Client(base_url=server.url) as client, client.stream(QUESTION, **OPTIONS) as stream:
        starts = [event for event in stream if isinstance(event, ColdStart)]
        assert stream.final().text == expected()
    assert starts[0].phase == "requested"
    assert worker_pid(server) not in {None, sleeper}
