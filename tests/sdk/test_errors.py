import pickle

import pytest

import kvrelay
from kvrelay import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    ContextOverflowError,
    InternalServerError,
    KvrelayClientError,
    NotFoundError,
    PermissionDeniedError,
    QueueFull,
    RateLimitError,
    RequestTimeoutError,
    RequestTooLargeError,
    ServiceUnavailableError,
    StreamInterrupted,
)
from kvrelay.testing import status

NO = {"x-should-retry": "false"}


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (400, BadRequestError),
        (401, AuthenticationError),
        (403, PermissionDeniedError),
        (404, NotFoundError),
        (405, APIStatusError),
        (408, RequestTimeoutError),
        (409, ConflictError),
        (413, RequestTooLargeError),
        (415, APIStatusError),
        (429, RateLimitError),
        (500, InternalServerError),
        (501, InternalServerError),
        (503, ServiceUnavailableError),
        (504, InternalServerError),
        (302, APIStatusError),
    ],
)
def test_each_status_has_its_class_and_the_servers_fields(ask, server, code, cls):
    server.queue(status(code, "no", code="c", type="t", param="p", headers=NO))
    error = ask(server).error
    assert type(error) is cls
    assert (error.status_code, error.code, error.type, error.param) == (code, "c", "t", "p")
    assert error.request_id == "req_1"
    assert str(error) == f"no [{code} c] (request req_1)"


def test_the_queue_says_when_to_come_back(ask, server):
    server.queue(status(429, code="queue_full", headers={"retry-after": "7", **NO}))
    error = ask(server).error
    assert isinstance(error, QueueFull)
    assert error.retry_after == 7.0


@pytest.mark.parametrize(
    "message",
    [
        (
            "This model's maximum context length is 4096 tokens, but the request needs 5000 tokens "
            "(4500 in the prompt, 500 for max_tokens)"
        ),
        (
            "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens "
            "(4500 in the messages, 500 in the completion). Please reduce the length."
        ),
        "the context is 4096 tokens, the request asks for 5000 (prompt 4500 + max_tokens 500)",
        (
            "This model's maximum context length is 4096 tokens. However, your messages resulted in "
            "5000 tokens."
        ),
        (
            "this model's context length is 4096 tokens; the request has 4500 prompt tokens and "
            "max_tokens=500, which needs at least 5000"
        ),
    ],
)
def test_context_overflow_names_limit_and_request(ask, server, message):
    server.queue(status(400, message, code="context_length_exceeded", param="messages"))
    error = ask(server).error
    assert isinstance(error, ContextOverflowError)
    assert (error.limit, error.requested) == (4096, 5000)


def test_context_overflow_prefers_numbers_to_prose(ask, server):
    fields = {
        "message": "maximum context length is 1, requested 2",
        "code": "context_length_exceeded",
        "limit": 4096,
        "requested": 5000,
    }
    server.queue(status(400, body={"error": fields}))
    error = ask(server).error
    assert (error.limit, error.requested) == (4096, 5000)


def test_context_overflow_without_numbers(ask, server):
    server.queue(status(400, "too long", code="context_length_exceeded"))
    error = ask(server).error
    assert (error.limit, error.requested) == (None, None)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the server gave no reason"),
        (b"<html>\nbad gateway", "<html>"),
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"object": "error", "message": "flat", "code": 418}, "flat"),
        ({"detail": []}, "without a message"),
        ([1], "[1]"),
        (b"\xff" * 10, "\ufffd"),
    ],
    ids=["empty", "html", "text", "flat", "detail", "list", "binary"],
)
def test_bodies_of_other_servers_still_say_something(ask, server, body, said):
    server.queue(status(418, body=body))
    error = ask(server).error
    assert error.status_code == 418
    assert said in str(error)


def _tree(cls):
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _tree(sub))]


def test_every_error_is_public_drawn_and_survives_pickling():
    drawing = kvrelay._errors.__doc__
    for cls in _tree(KvrelayClientError):
        assert cls.__name__ in kvrelay.__all__
        assert cls.__name__ in drawing
        error = cls("why")
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
        assert (type(again), str(again), vars(again)) == (cls, "why", vars(error))


def test_the_tree_lets_callers_catch_widely():
    assert issubclass(APITimeoutError, APIConnectionError)
    assert issubclass(QueueFull, RateLimitError)
    assert issubclass(ContextOverflowError, BadRequestError)
    assert issubclass(ServiceUnavailableError, InternalServerError)
    assert not issubclass(StreamInterrupted, APIStatusError)


def test_no_prompt_and_no_key_in_errors_and_their_causes(ask, server):
    import traceback

    secret = "correct horse battery staple"
    server.queue(status(400, "no"))
    for target in (server, type("Nobody", (), {"base_url": "http://127.0.0.1:9"})):
        error = ask(target, secret, client={"api_key": "sk-secret"}).error
        told = "".join(traceback.format_exception(error))
        assert secret not in told
        assert "sk-secret" not in told
