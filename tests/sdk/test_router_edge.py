"""The client against the router's real HTTP edge, with a scripted service behind it."""

import asyncio
import threading

import pytest

from kvrelay import (
    AuthenticationError,
    Client,
    ContextOverflowError,
    Finished,
    NotFoundError,
    Queued,
    QueueFull,
    Retries,
    Started,
    StreamInterrupted,
    TextDelta,
    Usage,
)

pytest.importorskip("fastapi")

from scripted_service import (
    PATH,
    TRACE_ID,
    ScriptedService,
    Wait,
    answer,
    stats,
    write_model_folder,
)

from kvrelay_protocol import errors as served
from kvrelay_router.config import RouterConfig
from kvrelay_router.http.app import create_app
from kvrelay_router.http.server import create_server, listen
from kvrelay_router.requests import types as router
from kvrelay_router.text.served_model import load_served_model

KEY = "sk-test"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_served_model(write_model_folder(tmp_path_factory.mktemp("model")), "org/tiny")


@pytest.fixture(scope="module")
def ids(model):
    return tuple(model.tokenizer.encode("Hello there 🙂", add_special_tokens=False))


@pytest.fixture
def service():
    return ScriptedService()


@pytest.fixture
def edge(service, model):
    from prometheus_client import CollectorRegistry

    config = RouterConfig(model_dir=".", model_name=model.name, port=0, api_keys=(KEY,))
    listener = listen("127.0.0.1", 0)
    server = create_server(create_app(service, model, config, CollectorRegistry()), config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.start()
    yield type("Edge", (), {"base_url": url})
    server.should_exit = True
    thread.join(15)
    assert not thread.is_alive()


@pytest.fixture
def asking(ask, edge):
    """Asks the edge with the right key and the model it has."""

    def run(messages="Hi", **options):
        return ask(edge, messages, **{"client": {"api_key": KEY}, "model": None, **options})

    return run


def test_a_whole_stream(asking, service, ids):
    service.script = answer(ids)
    asked = asking(max_tokens=20)
    queued, started, *rest = asked.events
    assert queued == Queued(1, 0.1)
    prompt = started.prompt_tokens
    reason = PATH.reason
    assert started == Started("disaggregated", reason, "prefill-0", "decode-0", 2, prompt)
    assert [type(event) for event in rest if not isinstance(event, TextDelta)] == [Finished, Usage]
    final = asked.final
    assert final.text == "Hello there 🙂"
    assert final.usage == Usage(prompt, len(ids), prompt + len(ids), 2)
    assert final.trace_id == TRACE_ID
    assert final.request_id
    timings = final.timings
    assert (timings.queue_ms, timings.kv_transfer_ms, timings.kv_bytes) == (1.0, 2.0, 4_000_000)
    assert (timings.path, timings.prefill_worker) == ("disaggregated", "prefill-0")
    assert (timings.kv_transport, timings.kv_gbps, timings.replays) == ("tcp", 2.0, 0)


def test_a_whole_answer(edge, call, service, ids):
    service.script = answer(ids)
    final = call(edge, "chat", "Hi", max_tokens=20, client={"api_key": KEY})
    assert final.text == "Hello there 🙂"
    assert final.finish_reason == "stop"
    assert final.trace_id == TRACE_ID
    assert (final.timings.path, final.timings.decode_worker) == ("disaggregated", "decode-0")


def test_the_small_calls(edge, call):
    key = {"api_key": KEY}
    (found,) = call(edge, "models", client=key)
    assert (found.id, found.max_model_len) == ("org/tiny", 512)
    assert call(edge, "health", client=key).ok
    tokens = call(edge, "tokenize", "Hello there 🙂", client=key)
    assert tokens.max_model_len == 512
    assert call(edge, "detokenize", tokens.ids, client=key) == "Hello there 🙂"


def test_an_unready_server_is_reported(edge, call, service):
    service.ready = False
    assert not call(edge, "health", client={"api_key": KEY}).ok


@pytest.mark.parametrize(
    ("options", "cls", "code"),
    [
        ({"model": "nobody"}, NotFoundError, "model_not_found"),
        ({"client": {"api_key": "wrong"}}, AuthenticationError, "invalid_api_key"),
        ({"max_tokens": 600}, ContextOverflowError, "context_length_exceeded"),
    ],
)
def test_errors_before_the_stream(asking, options, cls, code):
    error = asking(**options).error
    assert type(error) is cls
    assert error.code == code
    assert error.request_id
    if cls is ContextOverflowError:
        assert error.limit == 512
        assert error.requested > 600


def test_a_full_queue(asking, service):
    service.refusal = served.QueueFull("no room", retry_after_s=3)
    error = asking(client={"api_key": KEY, "retries": Retries(max=0)}).error
    assert type(error) is QueueFull
    assert error.retry_after == 3


def test_a_failure_after_the_head(asking, service, ids):
    def script(request):
        return [
            router.Placed(PATH, 0),
            router.Started(0),
            router.Tokens(ids[:2]),
            Wait(0.2),
            router.Failed(served.WorkerLost("decode-0 died")),
        ]

    service.script = script
    error = asking().error
    assert isinstance(error, StreamInterrupted)
    assert error.code == "worker_lost"
    assert error.partial
    assert error.request_id
    assert str(error).count(error.request_id) == 1


def test_a_resumed_stream(asking, service, ids):
    def script(request):
        return [
            router.Placed(PATH, 0),
            router.Started(0),
            router.Tokens(ids[:2]),
            router.Resumed(0.5, 2),
            router.Tokens(ids[2:]),
            router.Finished(router.FinishReason.STOP, stats(request, len(ids))),
        ]

    service.script = script
    asked = asking()
    assert asked.final.text == "Hello there 🙂"
    assert asked.final.timings.replays == 1


def test_leaving_cancels_at_the_service(edge, service, ids):
    service.script = answer(ids * 100, pause_s=0.05)
    with Client(edge.base_url, api_key=KEY) as client:
        with client.stream("Hi") as stream:
            next(stream.text_stream)
        deadline = threading.Event()
        for _ in range(100):
            if service.last.cancelled:
                break
            deadline.wait(0.05)
    assert service.last.cancelled
