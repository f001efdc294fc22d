import pytest

from kvrelay import (
    Client,
    Finished,
    InvalidResponseError,
    Started,
    TextDelta,
    Usage,
)
from kvrelay.testing import FakeServer, status, timings


def test_chat_returns_the_whole_answer(call):
    script = [
        Started("local"),
        TextDelta("Hello"),
        TextDelta(" you"),
        Finished("length"),
        Usage(3, 2, 5),
        timings(queue_ms=1.0, path="local", kv_bytes=0),
    ]
    with FakeServer(script) as server:
        final = call(server, "chat", "hi", model="fake", max_tokens=2)
        (request,) = server.requests
    assert (final.text, final.finish_reason, final.usage) == ("Hello you", "length", Usage(3, 2, 5))
    assert (final.timings.queue_ms, final.timings.path, final.timings.kv_bytes) == (1.0, "local", 0)
    assert final.timings.client_ttft_ms is None
    assert final.request_id == "req_1"
    assert request.json == {
        "model": "fake",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": False,
        "max_tokens": 2,
    }
    assert "x-stream-protocol" not in request.headers


def test_models(call, server):
    entry = {"id": "big", "max_model_len": 4096, "owned_by": "me"}
    server.queue(status(200, body={"data": [entry, {"no": "id"}]}), path="/v1/models")
    (model,) = call(server, "models")
    assert (model.id, model.max_model_len, model.raw) == ("big", 4096, entry)


def test_health_reports_instead_of_raising(call, server):
    assert call(server, "health").ok
    server.queue(status(503, body={"status": "starting"}), path="/health")
    health = call(server, "health")
    assert (health.ok, health.status_code, health.raw) == (False, 503, {"status": "starting"})
    server.queue(status(503, body=b""), path="/health")
    assert call(server, "health").raw == {}


def test_tokenize_and_back(call, server):
    tokens = call(server, "tokenize", "hé")
    assert (tokens.ids, len(tokens), tokens.max_model_len) == ((104, 195, 169), 3, 4096)
    assert call(server, "detokenize", tokens.ids) == "hé"
    messages = [{"role": "user", "content": "x"}]
    call(server, "tokenize", messages, model="fake")
    assert server.requests[-1].json == {"model": "fake", "messages": messages}


@pytest.mark.parametrize(
    ("method", "args", "path"),
    [
        ("models", (), "/v1/models"),
        ("chat", ("x",), "/v1/chat/completions"),
        ("tokenize", ("x",), "/tokenize"),
        ("detokenize", ((1,),), "/detokenize"),
    ],
)
@pytest.mark.parametrize("body", [b"<html>", {"choices": []}, [1]], ids=["html", "empty", "list"])
def test_a_success_of_the_wrong_shape_is_named(call, server, method, args, path, body):
    server.queue(status(200, body=body), path=path)
    options = {} if method == "models" else {"model": "fake"}
    with pytest.raises(InvalidResponseError):
        call(server, method, *args, **options)


def test_the_servers_key_is_asked_for(call):
    from kvrelay import AuthenticationError

    with FakeServer(api_key="sk-right") as server:
        with pytest.raises(AuthenticationError) as caught:
            call(server, "models", client={"api_key": "sk-wrong"})
        assert caught.value.code == "invalid_api_key"
        assert call(server, "models", client={"api_key": "sk-right"})


def test_settings_argument_beats_environment_beats_default(kvrelay_server, monkeypatch):
    monkeypatch.setenv("KVRELAY_API_KEY", "sk-env")
    with Client() as client:
        client.health()
    with Client(kvrelay_server.base_url + "/v1/", api_key="sk-arg") as client:
        client.health()
    with Client(api_key="") as client:
        client.health()
    assert [request.headers.get("authorization") for request in kvrelay_server.requests] == [
        "Bearer sk-env",
        "Bearer sk-arg",
        None,
    ]
    assert {request.path for request in kvrelay_server.requests} == {"/health"}
    monkeypatch.delenv("KVRELAY_BASE_URL")
    with Client() as client:
        assert client._flows.config.base_url == "http://127.0.0.1:8000"
    assert "sk-env" not in repr(client._flows.config)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "unix:///x"])
def test_an_unusable_base_url_is_refused_at_once(url):
    with pytest.raises(ValueError, match="base_url"):
        Client(url)


def test_a_path_prefix_is_kept(server):
    server.queue(status(200, body={}), path="/team/health")
    with Client(server.base_url + "/team/v1") as client:
        assert client.health().ok


@pytest.mark.parametrize("package", ["httpx", "httpx2"])
def test_an_injected_transport_is_used_and_left_open(server, package):
    httpx = pytest.importorskip(package)
    with httpx.Client(headers={"x-mine": "1"}) as http:
        client = Client(server.base_url, http_client=http)
        with client, client.stream("hello") as stream:
            assert stream.final_text() == "Hello world"
        assert not http.is_closed
    assert server.requests[-1].headers["x-mine"] == "1"
