"""What users import and see: changing any of this is a change of the public API."""

import dataclasses
import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_type_hints

import pytest

import kvrelay
from kvrelay import AsyncClient, AsyncStream, ChatOptions, Client, Stream, testing

ROOT = Path(__file__).parents[2]

PUBLIC = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncClient",
    "AsyncStream",
    "AsyncStreamManager",
    "AuthenticationError",
    "BadRequestError",
    "ChatOptions",
    "Client",
    "ColdStart",
    "CompletionOutput",
    "ConflictError",
    "ContextOverflowError",
    "Event",
    "Final",
    "Finished",
    "Health",
    "InternalServerError",
    "InvalidResponseError",
    "KvrelayClientError",
    "LLM",
    "Message",
    "Model",
    "NotFoundError",
    "PermissionDeniedError",
    "QueueFull",
    "Queued",
    "RateLimitError",
    "RequestOutput",
    "RequestTimeoutError",
    "RequestTooLargeError",
    "Resumed",
    "Retries",
    "SamplingParams",
    "ServiceUnavailableError",
    "Started",
    "Stream",
    "StreamInterrupted",
    "StreamManager",
    "TextDelta",
    "TextPrompt",
    "Timeout",
    "Timings",
    "Tokens",
    "TokensPrompt",
    "UnknownEvent",
    "Usage",
    "__version__",
]

FIELDS = {
    "Queued": ["position", "eta_s"],
    "ColdStart": ["pool", "phase", "done", "total", "eta_s"],
    "Started": [
        "path",
        "reason",
        "prefill_worker",
        "decode_worker",
        "cached_tokens",
        "prompt_tokens",
    ],
    "TextDelta": ["text", "snapshot"],
    "Resumed": ["gap_s", "from_index"],
    "Usage": ["prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"],
    "Finished": ["reason"],
    "UnknownEvent": ["name", "raw"],
    "Final": ["text", "finish_reason", "usage", "timings", "trace_id", "request_id"],
    "Timeout": ["connect", "first_token", "idle", "total"],
    "Retries": ["max", "backoff_s", "backoff_max_s", "retry_after_max_s"],
    "Model": ["id", "max_model_len", "raw"],
    "Health": ["ok", "status_code", "raw"],
    "Tokens": ["ids", "max_model_len"],
    "RequestOutput": [
        "request_id",
        "prompt",
        "prompt_token_ids",
        "outputs",
        "metrics",
        "num_cached_tokens",
        "error",
        "finished",
    ],
    "CompletionOutput": [
        "index",
        "text",
        "token_ids",
        "cumulative_logprob",
        "logprobs",
        "finish_reason",
        "stop_reason",
    ],
    "SamplingParams": [
        "n",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "max_tokens",
        "min_tokens",
        "logprobs",
        "detokenize",
        "skip_special_tokens",
        "include_stop_str_in_output",
    ],
    "Timings": [
        "client_ttft_ms",
        "client_itl_p50_ms",
        "client_itl_p95_ms",
        "queue_ms",
        "prefill_ms",
        "kv_transfer_ms",
        "kv_exposed_ms",
        "decode_ms",
        "tokens_per_s",
        "kv_bytes",
        "kv_transport",
        "kv_gbps",
        "path",
        "reason",
        "prefill_worker",
        "decode_worker",
        "cached_tokens",
        "replays",
        "retries",
    ],
}

CLIENT = ["chat", "close", "detokenize", "health", "models", "stream", "tokenize"]
OFFLINE = [
    "chat",
    "generate",
    "get_default_sampling_params",
    "get_tokenizer",
    "max_model_len",
    "reset_prefix_cache",
    "shutdown",
]
STREAM = [
    "cancel",
    "events",
    "final",
    "final_text",
    "request_id",
    "snapshot",
    "text_stream",
    "timings",
    "trace_id",
]


def members(cls):
    return sorted(name for name in dir(cls) if not name.startswith("_"))


def test_exports():
    assert sorted(kvrelay.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(kvrelay))
    for name in PUBLIC:
        assert getattr(kvrelay, name) is not None
    with pytest.raises(AttributeError, match="Klient"):
        kvrelay.Klient  # noqa: B018


def test_lazy_names_match_what_type_checkers_read():
    source = inspect.getsource(kvrelay)
    static = source.partition("if TYPE_CHECKING:\n")[2].partition("\nelse:")[0]
    scope = {}
    exec(textwrap.dedent(static).replace("__version__: str", ""), scope)  # noqa: S102 - our own
    for name in set(PUBLIC) - {"__version__"}:
        assert scope[name] is getattr(kvrelay, name)


def test_members():
    assert members(Client) == members(AsyncClient) == sorted(CLIENT)
    assert members(Stream) == members(AsyncStream) == sorted(STREAM)
    assert members(kvrelay.LLM) == OFFLINE


def test_testing_exports():
    for name in testing.__all__:
        assert getattr(testing, name) is not None


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name):
    cls = getattr(kvrelay, name)
    assert [field.name for field in dataclasses.fields(cls)] == FIELDS[name]
    assert cls.__dataclass_params__.frozen
    assert "__slots__" in vars(cls)


def test_options():
    assert set(ChatOptions.__optional_keys__) == {
        "model",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "extra",
        "idempotency_key",
        "timeout",
        "wait",
    }


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (Stream, AsyncStream)])
def test_both_clients_have_the_same_signatures(one, other):
    for name in [*members(one), "__init__"]:
        if not callable(getattr(one, name)) or (one is Stream and name == "__init__"):
            continue
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (one, other))
        assert list(ours.parameters) == list(theirs.parameters), name
        for parameter in ours.parameters.values():
            twin = theirs.parameters[parameter.name]
            assert (parameter.kind, parameter.default) == (twin.kind, twin.default)
            if parameter.name != "http_client":
                assert parameter.annotation == twin.annotation
        assert str(theirs.return_annotation).replace("Async", "") == str(ours.return_annotation)


def test_a_misspelt_option_is_refused_before_anything_is_sent(server):
    with Client(server.base_url) as client:
        with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
            client.stream("x", max_token=1)
        with pytest.raises(TypeError, match="extra="):
            client.chat("x", logit_bias={})
    assert server.requests == []


def loaded_by(code):
    script = f"import sys\n{code}\nimport json\nprint(json.dumps(sorted(sys.modules)))"
    shown = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], check=True, capture_output=True, text=True
    )
    return {name.partition(".")[0] for name in json.loads(shown.stdout)}


HEAVY = {"torch", "grpc", "fastapi", "starlette", "numpy", "transformers", "pytest"}
LATER = {"httpx", "httpcore", "pydantic", "asyncio", "ssl", "anyio"}


def test_importing_the_package_loads_nothing():
    assert not loaded_by("import kvrelay") & (HEAVY | LATER)


def test_the_clients_load_nothing_heavy():
    code = """
import kvrelay, kvrelay.testing
for name in kvrelay.__all__: getattr(kvrelay, name)
with kvrelay.testing.FakeServer() as server, kvrelay.Client(server.base_url) as client:
    assert client.chat("x").text
"""
    loaded = loaded_by(code)
    assert "httpx" in loaded
    assert not loaded & (HEAVY | {"opentelemetry"})


def test_every_public_object_has_annotations_that_resolve():
    for cls in (Client, AsyncClient, Stream, AsyncStream):
        for name in members(cls):
            member = inspect.getattr_static(cls, name)
            function = member.fget if isinstance(member, property) else member
            assert "return" in function.__annotations__, name
    assert get_type_hints(kvrelay.Final)["timings"] is kvrelay.Timings


TYPED = """
from collections.abc import AsyncIterator, Iterator
from typing import assert_never, assert_type

from kvrelay import (
    AsyncClient, Client, ColdStart, Event, Final, Finished, Message, Model, Queued, Resumed, Started,
    TextDelta, Timeout, Timings, Tokens, UnknownEvent, Usage,
)


def sync(client: Client, messages: list[Message]) -> None:
    with client.stream(messages, max_tokens=3, stop=["a"], timeout=Timeout(idle=None)) as stream:
        for event in stream:
            assert_type(event, Event)
            match event:
                case Queued() | ColdStart() | Started() | Resumed() | Usage() | Finished() | UnknownEvent():
                    pass
                case TextDelta(text=text):
                    assert_type(text, str)
                case _:
                    assert_never(event)
        assert_type(stream.text_stream, Iterator[str])
        assert_type(stream.final(), Final)
        assert_type(stream.timings, Timings)
        assert_type(stream.timings.client_ttft_ms, float | None)
        assert_type(stream.trace_id, str | None)
    assert_type(client.chat("hello"), Final)
    assert_type(client.models(), list[Model])
    assert_type(client.tokenize("x"), Tokens)


async def asynchronous(client: AsyncClient) -> None:
    async with client.stream("hello", temperature=0.0) as stream:
        async for event in stream:
            assert_type(event, Event)
        assert_type(stream.text_stream, AsyncIterator[str])
        assert_type(await stream.final(), Final)
        assert_type(await stream.final_text(), str)
    assert_type(await client.chat("hello"), Final)


def wrong(client: Client) -> None:
    client.stream("x", max_token=1)  # type: ignore[call-arg]
    client.stream("x", max_tokens="1")  # type: ignore[arg-type]
    client.chat([{"role": "robot", "content": "x"}])  # type: ignore[typeddict-item]
    for _ in client.stream("x"):  # type: ignore[attr-defined]
        pass
    import kvrelay

    kvrelay.Klient  # type: ignore[attr-defined]
"""


def test_types_are_what_the_documentation_says(tmp_path):
    pytest.importorskip("mypy")
    snippet = tmp_path / "snippet.py"
    snippet.write_text(TYPED)
    # --strict reports every `type: ignore` above that is not needed.
    shown = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--config-file=",
            f"--cache-dir={ROOT / '.mypy_cache' / 'sdk-snippet'}",
            str(snippet),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
