"""`kvrelay up --min 0`: no worker runs, a request waits for one and hears how far it is, and then none runs again."""

import asyncio
import contextlib
import re
import signal
import threading

import httpx
import openai
import psutil
import pytest
from server_process import Server, running_server
from tiny_models import reference_chat, tiny_model

from kvrelay import (
    AsyncClient,
    Client,
    ColdStart,
    Finished,
    KvrelayClientError,
    Queued,
    ServiceUnavailableError,
    Started,
    TextDelta,
)

MODEL = "tiny"
QUESTION = "the answer in another one"
OPTIONS = {"max_tokens": 12, "temperature": 0, "extra": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def stack():
    flags = ("--served-model-name", MODEL, "--kv-memory", "16MiB", "--dtype", "float32")
    with running_server(tiny_model("llama3"), "--min", "0", "--idle", "1", *flags) as running:
        yield running


@pytest.fixture
def server(stack):
    """With no worker left of the test before."""
    stack.wait(lambda: not worker_processes(stack))
    stack.wait(lambda: not stack.workers())
    return stack


def worker_processes(server: Server) -> list[str]:
    """Names of the workers that have a process."""
    names = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            names += re.findall(r"\b(?:prefill|decode)-\d+\b", " ".join(child.cmdline()))
    return names


def wakes(server: Server) -> float:
    """How often the decode pool was started from zero."""
    metrics = httpx.get(f"{server.url}/metrics").text
    found = re.search(r'kvrelay_scalings_total\{pool="decode",reason="wake"\} (\S+)', metrics)
    return float(found[1]) if found else 0.0


def expected(question: str = QUESTION) -> str:
    return reference_chat(tiny_model("llama3"), question, OPTIONS["max_tokens"])[1]


def test_at_zero_the_model_is_listed_and_the_server_is_well(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "phase": "asleep"}
    assert [m["id"] for m in httpx.get(f"{server.url}/v1/models").json()["data"]] == [MODEL]


def test_a_request_waits_hears_of_the_start_and_is_answered(server):
    with Client(base_url=server.url) as client, client.stream(QUESTION, **OPTIONS) as stream:
        events = list(stream)
        assert stream.final().text == expected()
    kinds = [type(event) for event in events]
    assert kinds.index(Queued) < kinds.index(ColdStart) < kinds.index(Started)
    assert kinds.index(Started) < kinds.index(TextDelta) < kinds.index(Finished)
    starts = [event for event in events if isinstance(event, ColdStart)]
    assert (starts[0].pool, starts[0].phase) == ("decode", "requested")
    # Which of its phases are seen depends on how fast they pass.
    assert {start.phase for start in starts} - {"requested"}, "the worker itself said nothing"


def test_100_waiting_requests_cause_one_start_and_all_are_answered(server):
    before = wakes(server)
    questions = [f"{n} the other one" for n in range(100)]

    async def ask_all() -> list[str]:
        async with AsyncClient(base_url=server.url) as client:
            answers = await asyncio.gather(*(client.chat(q, **OPTIONS) for q in questions))
        return [answer.text for answer in answers]

    assert asyncio.run(ask_all()) == [expected(question) for question in questions]
    assert wakes(server) == before + 1


@pytest.mark.parametrize("stream", [True, False])
def test_the_openai_client_rides_through(server, stream):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=12,
            temperature=0,
            extra_body={"ignore_eos": True},
            stream=stream,
        )
        if stream:
            text = "".join(c.choices[0].delta.content or "" for c in answer if c.choices)
        else:
            text = answer.choices[0].message.content
    assert text == expected()


def test_who_does_not_want_to_wait_is_told_when_to_come_back(server):
    with Client(base_url=server.url) as client:
        with pytest.raises(ServiceUnavailableError, match="the model sleeps") as caught:
            client.chat(QUESTION, wait=0, **OPTIONS)
        assert caught.value.code == "wait_over"
        assert caught.value.retry_after >= 1
        # It was a call to wake up all the same.
        server.wait(lambda: any(w["role"] == "decode" for w in server.workers()))
        assert client.chat(QUESTION, **OPTIONS).text == expected()


def test_a_worker_killed_while_it_starts_is_started_again(server):
    async def ask() -> str:
        async with AsyncClient(base_url=server.url) as client:
            asking = asyncio.create_task(client.chat(QUESTION, **OPTIONS))
            await asyncio.to_thread(server.wait, lambda: "decode-0" in worker_processes(server))
            if not server.workers():
                server.kill("decode-0")
            return (await asking).text

    assert asyncio.run(ask()) == expected()


def test_sigterm_while_a_request_waits_gives_it_its_answer_or_its_reason():
    flags = ("--served-model-name", MODEL, "--kv-memory", "16MiB", "--dtype", "float32")
    with running_server(tiny_model("llama3"), "--min", "0", *flags) as server:
        heard: list[object] = []
        refused: list[KvrelayClientError] = []

        def ask() -> None:
            with (
                Client(base_url=server.url) as client,
                client.stream(QUESTION, **OPTIONS) as stream,
            ):
                try:
                    heard.extend(stream)  # one by one, as they come
                except KvrelayClientError as error:
                    refused.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        server.wait(lambda: any(isinstance(event, Queued) for event in list(heard)))
        server.process.send_signal(signal.SIGTERM)
        asking.join(100)
        assert server.process.wait(100) == 0, server.log.read_text()
    assert not asking.is_alive()
    text = "".join(event.text for event in heard if isinstance(event, TextDelta))
    if any(isinstance(event, Finished) for event in heard):
        assert text == expected()
    else:
        assert (text, [error.code for error in refused]) == ("", ["draining"])
