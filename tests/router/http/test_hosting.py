"""`/ping` and `/invocations`: served where a platform asks for them, on the handlers of OpenAI's routes."""

import httpx
import pytest
from scripted_service import answer

from kvrelay_router.http.hosting import ping_status
from kvrelay_router.requests.types import Health

HELLO = [{"role": "user", "content": "Hello"}]
KEY = "sk-test"


@pytest.fixture
def hosted(make_app, service):
    """Clients of edges with these settings, in process."""

    def make(**settings):
        app = make_app(**{"ping_while_starting": 503, **settings})
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge")

    return make


@pytest.mark.parametrize("path", ["/ping", "/invocations"])
async def test_a_router_that_no_platform_asked_for_them_does_not_have_them(client, path):
    assert (await client.get(path)).status_code == 404


async def test_they_are_in_the_document_of_routes(hosted):
    paths = (await hosted().get("/openapi.json")).json()["paths"]
    assert set(paths["/ping"]) == {"get"}
    assert set(paths["/invocations"]) == {"post"}


@pytest.mark.parametrize("while_starting", [503, 204])
async def test_ping_is_200_only_when_the_model_can_answer(hosted, service, while_starting):
    client = hosted(ping_while_starting=while_starting)
    service.ready = False
    reply = await client.get("/ping")
    assert (reply.status_code, reply.content) == (while_starting, b"")
    service.ready = True
    reply = await client.get("/ping")
    assert (reply.status_code, reply.content) == (200, b"")


@pytest.mark.parametrize("while_starting", [503, 204])
def test_who_drains_is_not_starting(while_starting):
    assert ping_status(Health(ready=False, phase="draining"), while_starting) == 503


@pytest.mark.parametrize(
    ("body", "kind", "route"),
    [
        ({"messages": HELLO}, "chat.completion", "/v1/chat/completions"),
        ({"prompt": "Hello"}, "text_completion", "/v1/completions"),
        ({"prompt": [5, 6], "messages": None}, "text_completion", "/v1/completions"),
    ],
)
async def test_the_body_says_which_of_openais_routes_is_meant(hosted, service, body, kind, route):
    service.script = answer([5, 6])
    client = hosted()
    there = (await client.post(route, json={**body, "model": "org/tiny"})).json()
    here = (await client.post("/invocations", json=body)).json()
    assert here["object"] == kind
    assert here["model"] == "org/tiny"
    assert here["choices"] == there["choices"]
    assert here["usage"] == there["usage"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": HELLO, "prompt": "Hello"}, "has both of messages and prompt"),
        ({"inputs": "Hello"}, "has neither of messages and prompt"),
        ({"prompt": None}, "has neither of messages and prompt"),
    ],
)
async def test_a_body_that_is_neither_or_both_is_refused(hosted, body, said):
    reply = await hosted().post("/invocations", json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]


async def test_another_model_is_refused(hosted):
    reply = await hosted().post("/invocations", json={"prompt": "Hello", "model": "other"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


async def test_other_methods_and_bodies_are_refused_as_everywhere(hosted):
    client = hosted()
    assert (await client.get("/invocations")).json()["error"]["code"] == "method_not_allowed"
    as_text = {"content-type": "application/octet-stream"}
    reply = await client.post("/invocations", content=b"{}", headers=as_text)
    assert reply.json()["error"]["code"] == "unsupported_media_type"
    unlisted = {"X-Amzn-SageMaker-Custom-Attributes": "trace=1"}
    reply = await client.post("/invocations", json={"prompt": "Hello"}, headers=unlisted)
    assert reply.status_code == 200


async def test_invocations_needs_a_key_and_ping_does_not(hosted):
    client = hosted(api_keys=(KEY,))
    assert (await client.get("/ping")).status_code == 200
    body = {"prompt": "Hello"}
    reply = await client.post("/invocations", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    reply = await client.post("/invocations", json=body, headers={"x-api-key": KEY})
    assert reply.status_code == 200


async def test_a_key_is_found_beside_the_one_of_the_platform(hosted):
    client = hosted(api_keys=(KEY,))
    both = {"authorization": "Bearer of-the-platform", "x-api-key": KEY}
    reply = await client.post("/invocations", json={"prompt": "Hello"}, headers=both)
    assert reply.status_code == 200
    neither = {"authorization": "Bearer of-the-platform", "x-api-key": "wrong"}
    reply = await client.post("/invocations", json={"prompt": "Hello"}, headers=neither)
    assert reply.status_code == 401
