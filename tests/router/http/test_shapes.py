"""Shapes of answers and errors, in process."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_service import answer

from kvrelay_router.http.limits import BoundedBody
from kvrelay_router.requests.types import PathKind

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
BODY = {"model": "org/tiny", "messages": HELLO}
JSON = {"content-type": "application/json"}


def error_of(reply, status, code):
    assert reply.status_code == status, reply.text
    assert set(reply.json()) == {"error"}
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert isinstance(error["message"], str)
    assert error["message"]
    assert reply.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"a": "\xff"}', b'{"temperature": NaN}',
        b'{"temperature": Infinity}', b'{"model": "\\ud800"}', b"[" * 60_000,
        b'{"seed": ' + b"9" * 5000 + b"}", b'{"a":' * 5000, b"\x00", b'{"model": "x",}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", [CHAT, "/v1/completions", "/tokenize", "/detokenize"])
async def test_broken_json(client, route, body):
    error_of(await client.post(route, content=body, headers=JSON), 400, "invalid_value")


@pytest.mark.parametrize(
    "given_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"]
)
async def test_wrong_content_type(client, given_type):
    headers = {} if given_type is None else {"content-type": given_type}
    reply = await client.post(CHAT, content=json.dumps(BODY), headers=headers)
    error_of(reply, 415, "unsupported_media_type")


async def test_a_charset_is_no_wrong_content_type(client):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await client.post(CHAT, content=json.dumps(BODY), headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/docs", "/redoc", "/v1/embeddings", "/health/", "/%00%ff"]
)
async def test_unknown_routes(client, path):
    error_of(await client.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", CHAT), ("DELETE", "/v1/models"), ("PUT", "/health"), ("OPTIONS", CHAT)],
)
async def test_wrong_methods(client, method, path):
    reply = await client.request(method, path)
    error_of(reply, 405, "method_not_allowed")
    assert reply.headers["allow"]


async def test_many_errors_are_cut_short(client):
    names = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stream",
             "ignore_eos", "cache_salt", "stop_token_ids"]  # fmt: skip
    reply = await client.post(CHAT, json={**BODY, **{name: {"x": 1} for name in names}})
    assert "and 2 more" in error_of(reply, 400, "invalid_value")["message"]
    assert len(reply.content) < 5000


@pytest.mark.parametrize(
    ("route", "body", "place"),
    [
        (CHAT, {**BODY, "messages": [{}] * 5000}, "messages[0].role"),
        (CHAT, {**BODY, "messages": [HELLO[0]] + [7] * 5000}, "messages[1]"),
        ("/tokenize", {"messages": [7] * 5000}, "messages[0]"),
        ("/detokenize", {"tokens": [{}] * 5000}, "tokens[0]"),
    ],
)
async def test_a_list_of_bad_items_is_refused_at_the_first(client, route, body, place):
    error = error_of(await client.post(route, json=body), 400, "invalid_value")
    assert error["param"] == place
    assert error["message"].count(";") <= 1


async def test_findings_speak_of_json_not_of_python(client):
    body = {"model": 3, "messages": [7], "max_tokens": 0, "stream": "yes"}
    message = error_of(await client.post(CHAT, json=body), 400, "invalid_value")["message"]
    assert "model: must be a string (got 3)" in message
    assert "messages[0]: must be an object (got 7)" in message
    assert "max_tokens: must be greater than or equal to 1 (got 0)" in message
    assert "stream: must be true or false" in message
    empty = await client.post(CHAT, json={**BODY, "messages": []})
    assert "messages: must not be empty" in empty.json()["error"]["message"]


@pytest.mark.parametrize(("route", "field"), [(CHAT, "messages"), ("/v1/completions", "prompt")])
async def test_a_text_far_beyond_the_context_is_refused_without_reading_all_of_it(
    client, model, monkeypatch, route, field
):
    read = []
    encode = model.tokenizer.encode

    def counting(text, **options):
        read.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(model.tokenizer, "encode", counting)
    text = "x y z " * 10_000
    value = text if field == "prompt" else [{"role": "user", "content": text}]
    reply = await client.post(route, json={"model": "org/tiny", field: value, "max_tokens": 9})
    error = error_of(reply, 400, "context_length_exceeded")
    assert "512 tokens" in error["message"]
    assert "more than 512 prompt tokens and max_tokens=9" in error["message"]
    assert sum(read) < len(text)


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate"])
async def test_a_compressed_body_is_refused_by_name(client, encoding):
    headers = {**JSON, "content-encoding": encoding}
    reply = await client.post(CHAT, content=json.dumps(BODY), headers=headers)
    assert encoding in error_of(reply, 415, "unsupported_media_type")["message"]


async def test_detokenize_refuses_ids_that_are_no_token(client, model):
    reply = await client.post("/detokenize", json={"tokens": [1, model.vocab_size]})
    error = error_of(reply, 400, "invalid_value")
    assert error["param"] == "tokens"
    assert str(model.vocab_size) in error["message"]


async def test_errors_do_not_show_prompt_text_or_internals(client):
    body = {
        **BODY,
        "messages": [{"role": "SECRET", "content": {"x": "SECRET"}}],
        "stop": "SECRET" * 100,
    }
    text = (await client.post(CHAT, json=body)).text
    assert "SECRET" not in text
    for word in ("pydantic", "function-", "union", "Traceback"):
        assert word not in text


@pytest.mark.parametrize(
    "neutral",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False},
        {
            "tools": [],
            "tool_choice": "none",
            "functions": None,
            "response_format": {"type": "text"},
        },
        {
            "max_tokens": None,
            "temperature": None,
            "stop": None,
            "n": None,
            "seed": None,
            "stream": None,
        },
        {"top_k": -1, "top_p": 1, "min_p": 0, "repetition_penalty": 1.0, "best_of": 1},
        {"user": 5, "metadata": {"a": []}, "store": True, "service_tier": "auto"},
        {"stop": [], "stop_token_ids": None, "ignore_eos": None, "stream_options": None},
    ],
)
async def test_neutral_values_are_fine(client, neutral):
    assert (await client.post(CHAT, json={**BODY, **neutral})).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["audio", "function_call", "functions", "logit_bias", "logprobs", "modalities", "moderation",
     "presence_penalty", "reasoning_effort", "repetition_penalty", "structured_outputs", "tools",
     "top_logprobs", "verbosity", "web_search_options", "min_tokens", "return_token_ids", "best_of"],
)  # fmt: skip
async def test_unsupported_parameters_are_named(client, name):
    reply = await client.post(CHAT, json={**BODY, name: [{"type": "image"}]})
    assert error_of(reply, 400, "unsupported_parameter")["param"] == name


async def test_suffix_is_refused(client):
    body = {"model": "org/tiny", "prompt": "x", "suffix": "y"}
    assert (
        error_of(await client.post("/v1/completions", json=body), 400, "unsupported_parameter")[
            "param"
        ]
        == "suffix"
    )


async def test_tool_turns_are_refused(client):
    body = {**BODY, "messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}
    error = error_of(await client.post(CHAT, json=body), 400, "unsupported_parameter")
    assert error["param"] == "messages[0].tool_calls"


async def test_ignored_parameters_are_listed(client):
    body = {**BODY, "zzz": 1, "a\nb": 2, "ünder": 3, "store": True, "user": "me", "logprobs": None}
    reply = await client.post(CHAT, json=body)
    assert reply.headers["x-ignored-params"] == "a?b, store, zzz, ?nder"
    many = await client.post(CHAT, json={**BODY, **{f"k{i}": i for i in range(1000)}})
    assert len(many.headers["x-ignored-params"]) < 300
    assert "x-ignored-params" not in (await client.post(CHAT, json=BODY)).headers


async def test_content_parts_and_roles(client, service, model):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}],
        },
    ]
    assert (await client.post(CHAT, json={**BODY, "messages": messages})).status_code == 200
    text = model.tokenizer.decode(service.last.request.prompt_tokens)
    assert text == "system\nBe brief.\nuser\none two\nassistant\n"


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        ({"temperature": 0.00001}, {"temperature": 0.0}),
        (
            {"temperature": 1, "top_k": -1, "top_p": 0.5, "min_p": 0.1},
            {"top_k": 0, "top_p": 0.5, "min_p": 0.1},
        ),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({}, {"temperature": 0.7, "top_k": 20}),
    ],
)
async def test_sampling(client, service, sent, got):
    assert (await client.post(CHAT, json={**BODY, **sent})).status_code == 200
    sampling = service.last.request.sampling
    assert {name: getattr(sampling, name) for name in got} == got


async def test_stops_and_limits(client, service):
    body = {
        **BODY,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "max_tokens": 7,
        "max_completion_tokens": 5,
        "cache_salt": "s",
    }
    assert (await client.post(CHAT, json=body)).status_code == 200
    request = service.last.request
    assert (request.stop_token_ids, request.max_tokens, request.cache_salt) == ({9}, 5, b"s")
    assert (await client.post(CHAT, json=BODY)).status_code == 200
    request = service.last.request
    assert request.max_tokens == 512 - len(request.prompt_tokens)
    assert request.stop_token_ids == {0, 2}
    first = request.sampling.seed
    await client.post(CHAT, json=BODY)
    assert service.last.request.sampling.seed != first


async def test_caller_headers(client, service):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {
        "traceparent": trace,
        "x-request-timeout": "5",
        "x-kvrelay-force-path": "local",
        "x-request-id": "the-callers-own",
    }
    reply = await client.post(CHAT, json=BODY, headers=headers)
    request = service.last.request
    assert (request.traceparent, request.deadline_s, request.force_path) == (
        trace,
        5.0,
        PathKind.LOCAL,
    )
    assert reply.headers["x-request-id"] == "the-callers-own"
    assert "the-callers-own" not in request.request_id
    for bad in (
        {"x-request-timeout": "nan"},
        {"x-request-timeout": "-1"},
        {"x-kvrelay-force-path": "up"},
    ):
        error_of(await client.post(CHAT, json=BODY, headers=bad), 400, "invalid_value")
    reply = await client.post(
        CHAT, json=BODY, headers={"x-request-id": "a b<script>", "traceparent": "x"}
    )
    assert reply.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        [],
        [[]],
        "",
        [""],
        ["x", 5],
        [True],
        [-1],
        [[1], "x"],
        [1.5],
        ["x"] * 17,
        [10**30],
        [399_999],
        {"x": 1},
    ],
)
async def test_bad_prompts(client, prompt):
    reply = await client.post("/v1/completions", json={"model": "org/tiny", "prompt": prompt})
    assert error_of(reply, 400, "invalid_value")["param"] == "prompt"


async def test_n_times_prompts_is_bounded(client, service):
    body = {"model": "org/tiny", "prompt": ["a"] * 9, "n": 2}
    error_of(await client.post("/v1/completions", json=body), 400, "invalid_value")
    assert service.streams == []


async def test_stop_tokens_of_the_client_are_not_shown(client, service, model):
    ids = model.tokenizer.encode("abc", add_special_tokens=False)
    end = model.tokenizer.encode("!", add_special_tokens=False)[0]
    service.script = answer([*ids, end])
    reply = await client.post(
        "/v1/completions", json={"model": "org/tiny", "prompt": "x", "stop_token_ids": [end]}
    )
    assert reply.json()["choices"][0]["text"] == "abc"
    assert reply.json()["usage"]["completion_tokens"] == len(ids) + 1


async def test_tokenize_and_detokenize(client, model):
    reply = (await client.post("/tokenize", json={"prompt": "Köln 🙂", "model": "org/tiny"})).json()
    assert reply["tokens"] == model.tokenizer.encode("Köln 🙂", add_special_tokens=True)
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), 512)
    back = await client.post("/detokenize", json={"tokens": reply["tokens"]})
    assert back.json() == {"prompt": "Köln 🙂"}
    chat = (await client.post("/tokenize", json={"messages": HELLO})).json()
    assert model.tokenizer.decode(chat["tokens"]) == "user\nHello\nassistant\n"
    for bad in ({}, {"prompt": "x", "messages": HELLO}, {"prompt": 5}, {"messages": []}):
        error_of(await client.post("/tokenize", json=bad), 400, "invalid_value")
    for bad in ({}, {"tokens": "x"}, {"tokens": [-1]}, {"tokens": [2**31]}):
        error_of(await client.post("/detokenize", json=bad), 400, "invalid_value")
    error_of(
        await client.post("/detokenize", json={"tokens": [1], "model": "x"}), 404, "model_not_found"
    )


async def test_health(client, service):
    reply = await client.get("/health")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok", "phase": "ready"})
    verbose = (await client.get("/health?verbose=1")).json()
    assert verbose["workers"][0]["name"] == "decode-0"
    assert (await client.head("/health")).status_code == 200
    service.ready = False
    reply = await client.get("/health?verbose")
    assert reply.status_code == 503
    assert reply.json() == {
        "status": "unavailable",
        "phase": "waiting_for_decode_worker",
        "workers": [],
        "starting": [],
    }


async def test_metrics_are_negotiated(client):
    plain = await client.get("/metrics")
    assert "kvrelay_test_total 1.0" in plain.text
    assert plain.headers["content-type"].startswith("text/plain")
    openmetrics = await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


async def test_the_openapi_document_names_every_route(client):
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert set(paths) == {
        CHAT, "/v1/completions", "/v1/models", "/v1/models/{model_id}", "/health", "/metrics",
        "/tokenize", "/detokenize",
    }  # fmt: skip


@pytest.mark.parametrize("length", ["1" * 30, "x", "-5", "999999999"])
async def test_odd_content_lengths(client, length):
    reply = await client.post(CHAT, content=b"{}", headers={**JSON, "content-length": length})
    assert reply.status_code in {400, 413}
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


async def test_other_scopes_pass_through():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    await BoundedBody(app, 1)({"type": "lifespan"}, None, None)
    assert seen == ["lifespan"]


NAMES = st.sampled_from([
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "min_p", "seed", "n", "stop", "stop_token_ids", "ignore_eos", "stream",
    "stream_options", "cache_salt", "echo", "suffix", "tools", "logit_bias", "tokens", "user",
    "response_format", "metadata", "add_special_tokens",
])  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(["org/tiny", "user", "text", "assistant", "role", "content"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=4
        ),
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": inner}),
    ),
    max_leaves=6,
)
MOSTLY_VALID = st.fixed_dictionaries(
    {"model": st.just("org/tiny"), "messages": st.just(HELLO), "prompt": st.just("x")}
)
ROUTES = st.sampled_from([CHAT, "/v1/completions", "/tokenize", "/detokenize"])
fuzz = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def never_a_defect(reply):
    assert reply.status_code in {200, 400, 404, 413, 415}, reply.text
    if reply.status_code != 200:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert len(reply.content) < 8000


@fuzz
@given(route=ROUTES, base=MOSTLY_VALID, change=st.dictionaries(NAMES, VALUES, max_size=4))
async def test_no_json_body_gives_a_500(client, route, base, change):
    raw = json.dumps({**base, **change}, ensure_ascii=True)
    never_a_defect(await client.post(route, content=raw, headers=JSON))


@fuzz
@given(
    route=ROUTES,
    raw=st.one_of(st.binary(max_size=80), st.text('{}[]",:0123456789.eE-+ntf\\u', max_size=60)),
)
async def test_no_bytes_give_a_500(client, route, raw):
    content = raw.encode() if isinstance(raw, str) else raw
    never_a_defect(await client.post(route, content=content, headers=JSON))
