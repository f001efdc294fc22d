"""The openai package against a real server."""

import httpx
import openai
import pytest
from scripted_service import TRACE_ID, Wait, answer

from kvrelay_protocol.errors import Draining, QueueFull, WorkerLost
from kvrelay_router.requests.types import Failed, FinishReason, Placed, Queued, Started, Tokens

MODEL = "org/tiny"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def says(model, service):
    def say(text, **options):
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        service.script = answer(ids, **options)
        return ids

    return say


def test_a_whole_chat_answer(sdk, says, service, model):
    ids = says("Schöne Grüße 🙂!")
    raw = sdk.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, temperature=0, seed=7, max_tokens=50
    )
    done = raw.parse()
    assert done.choices[0].message.content == "Schöne Grüße 🙂!"
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == "stop"
    assert done.object == "chat.completion"
    assert done.usage.completion_tokens == len(ids)
    assert done.usage.prompt_tokens == len(service.last.request.prompt_tokens)
    assert done.usage.total_tokens == done.usage.prompt_tokens + len(ids)
    assert done.usage.prompt_tokens_details.cached_tokens == 2
    assert raw.headers["x-kvrelay-path"] == "disaggregated"
    assert raw.headers["x-trace-id"] == TRACE_ID
    assert raw.headers["x-request-id"].startswith("req_")
    assert done.model_extra["kvrelay"]["kv_gbps"] == 2.0
    request = service.last.request
    assert model.tokenizer.decode(request.prompt_tokens) == "user\nHello\nassistant\n"
    assert (request.sampling.temperature, request.sampling.seed, request.max_tokens) == (0.0, 7, 50)
    assert request.sampling.top_k == 20  # generation_config.json
    assert request.stop_token_ids == {0, 2}
    assert service.last.cancelled == []


def test_a_streamed_chat_answer(sdk, says):
    ids = says("Schöne Grüße 🙂!", reason=FinishReason.LENGTH)
    chunks = list(
        sdk.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    *answers, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in answers) == "Schöne Grüße 🙂!"
    assert [c.choices[0].finish_reason for c in answers if c.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in answers)
    assert last.choices == []
    assert last.usage.completion_tokens == len(ids)


def test_the_stream_helper_of_the_client(sdk, says):
    says("Hello there")
    with sdk.chat.completions.stream(model=MODEL, messages=HELLO) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "Hello there"


def test_plain_completions(sdk, says, service, model):
    says(" jumps")
    done = sdk.completions.create(model=MODEL, prompt="The fox", echo=True)
    assert done.choices[0].text == "The fox jumps"
    ids = model.tokenizer.encode("The fox", add_special_tokens=False)
    assert service.last.request.prompt_tokens == tuple(ids)
    done = sdk.completions.create(model=MODEL, prompt=[ids, ids[:1]], n=2)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in done.choices] == [" jumps"] * 4
    assert done.usage.prompt_tokens == len(ids) + 1
    stream = sdk.completions.create(model=MODEL, prompt="The fox", stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "The fox jumps"


def test_n_answers_have_different_seeds_and_share_the_prompt(sdk, says, service):
    ids = says("Hello there", pause_s=0.002)
    chunks = sdk.chat.completions.create(
        model=MODEL, messages=HELLO, n=3, seed=2**64 - 1, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["Hello there"] * 3
    assert chunk.usage.completion_tokens == 3 * len(ids)
    assert chunk.usage.prompt_tokens == len(service.last.request.prompt_tokens)
    assert [s.request.sampling.seed for s in service.streams] == [2**64 - 1, 0, 1]
    assert len({s.request.request_id for s in service.streams}) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_the_work(sdk, says, service, model, stream):
    says("one two END three four", pause_s=0.001)
    result = sdk.chat.completions.create(
        model=MODEL, messages=HELLO, stop=["END", "zzz"], stream=stream
    )
    if stream:
        chunks = list(result)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = result.choices[0].message.content, result.choices[0].finish_reason
        until_stop = model.tokenizer.encode("one two END", add_special_tokens=False)
        assert abs(result.usage.completion_tokens - len(until_stop)) <= 1
    assert (text, reason) == ("one two ", "stop")
    assert service.last.stopped_early


def test_models(sdk):
    (listed,) = sdk.models.list()
    assert listed.id == MODEL
    assert listed.model_extra["max_model_len"] == 512
    assert sdk.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("change", "error", "code", "param"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model_not_found", "model"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"messages": "hi"}, openai.BadRequestError, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, openai.BadRequestError, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "robot", "content": ""}]}, openai.BadRequestError, "invalid_value", "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError, "invalid_value", "messages[0].content",
        ),
        ({"max_tokens": -1}, openai.BadRequestError, "invalid_value", "max_tokens"),
        ({"max_tokens": "5"}, openai.BadRequestError, "invalid_value", "max_tokens"),
        ({"temperature": 2.5}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"temperature": True}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"n": 17}, openai.BadRequestError, "invalid_value", "n"),
        ({"stop": [""]}, openai.BadRequestError, "invalid_value", "stop"),
        ({"stop": ["x"] * 17}, openai.BadRequestError, "invalid_value", "stop"),
        ({"logprobs": True}, openai.BadRequestError, "unsupported_parameter", "logprobs"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "unsupported_parameter", "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "unsupported_parameter", "response_format"),
        ({"stream_options": {}}, openai.BadRequestError, "invalid_value", "stream_options"),
    ],
)  # fmt: skip
def test_typed_errors(sdk, change, error, code, param):
    body = {"model": MODEL, "messages": HELLO, **change}
    with pytest.raises(error) as caught:
        sdk.chat.completions.create(**body)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.request_id.startswith("req_")
    assert isinstance(caught.value.body, dict)


def test_overflow_names_limit_prompt_and_max_tokens(sdk):
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"
    assert "512" in caught.value.message
    assert "max_tokens=5000" in caught.value.message
    assert "prompt tokens" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.completions.create(model=MODEL, prompt=[5] * 512)
    assert caught.value.code == "context_length_exceeded"


def test_bad_key(live, sdk):
    with pytest.raises(openai.AuthenticationError) as caught:
        sdk.with_options(api_key="sk-wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert httpx.get(f"{live.url}/v1/models").status_code == 401
    assert httpx.get(f"{live.url}/openapi.json").status_code == 401
    assert httpx.get(f"{live.url}/v1/models", headers={"x-api-key": "other"}).status_code == 200
    assert httpx.get(f"{live.url}/health").status_code == 200
    assert httpx.get(f"{live.url}/metrics").status_code == 200


def test_a_body_over_the_limit(sdk):
    with pytest.raises(openai.APIStatusError) as caught:
        sdk.completions.create(model=MODEL, prompt="x" * (20 << 20))
    assert caught.value.status_code == 413
    assert caught.value.code == "request_too_large"


def test_a_chunked_body_over_the_limit(live):
    def endless():
        for _ in range(320):
            yield b"x" * 65536

    reply = httpx.post(
        f"{live.url}/v1/completions",
        content=endless(),
        headers={"content-type": "application/json", "x-api-key": "other"},
    )
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("refusal", "error", "status", "retry_after"),
    [
        (QueueFull("full", retry_after_s=400), openai.RateLimitError, 429, "60"),
        (Draining("bye"), openai.InternalServerError, 503, "1"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_before_the_head(sdk, service, refusal, error, status, retry_after, stream):
    service.refusal = refusal
    with pytest.raises(error) as caught:
        sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
    assert caught.value.status_code == status
    assert caught.value.response.headers["retry-after"] == retry_after


@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_head_keep_their_status(sdk, service, stream):
    service.script = lambda _: [Queued(1, None), Wait(0.05), Failed(WorkerLost("gone"))]
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (503, "worker_lost")


def test_failures_after_the_head_raise_with_the_request_id(sdk, service, model):
    from scripted_service import PATH

    ids = tuple(model.tokenizer.encode("Hello", add_special_tokens=False))
    service.script = lambda _: [
        Placed(PATH, 0), Started(0), Tokens(ids), Wait(0.05), Failed(WorkerLost("worker gone")),
    ]  # fmt: skip
    stream = sdk.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, extra_headers={"x-request-id": "mine-1"}
    )
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "worker_lost"
    assert "worker gone (request id mine-1)" in caught.value.message
    assert stream.response.headers["x-request-id"] == "mine-1"
    assert service.last.cancelled == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_defect_is_a_nested_500_with_the_request_id(sdk, service, caplog, stream):
    from scripted_service import PATH

    service.script = lambda _: [ValueError("SECRET PROMPT")]
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
    assert caught.value.code == "internal_error"
    service.script = lambda _: [Placed(PATH, 0), Wait(0.05), ValueError("SECRET PROMPT")]
    with pytest.raises(openai.APIError) as caught:
        list(sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=stream) or [])
    assert caught.value.code == "internal_error"
    assert "SECRET" not in caplog.text
    assert "ValueError" in caplog.text


def test_a_stream_without_a_terminal_event_is_an_error(sdk, service):
    from scripted_service import PATH

    service.script = lambda _: [Placed(PATH, 0), Wait(0.01)]
    with pytest.raises(openai.APIError):
        list(sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
