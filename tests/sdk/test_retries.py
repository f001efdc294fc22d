import socket
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay import (
    APIConnectionError,
    APIStatusError,
    Client,
    Finished,
    InternalServerError,
    Queued,
    Retries,
    StreamInterrupted,
    TextDelta,
)
from kvrelay._exchange import Failure, Head
from kvrelay._retry import pause_before_retry, retry_after_s
from kvrelay.testing import FakeServer, drop, end, ping, status

POLICY = Retries()


@pytest.mark.parametrize("code", [408, 409, 429, 500, 502, 503, 504, 529])
def test_statuses_that_may_pass_are_tried_again(ask, server, code):
    server.queue(status(code), status(code))
    asked = ask(server)
    assert asked.final.text == "Hello world"
    assert asked.final.timings.retries == 2
    first, *others = server.chats()
    assert all(request.body == first.body for request in others)
    keys = {request.headers["idempotency-key"] for request in server.chats()}
    assert len(keys) == 1
    assert keys.pop().startswith("idem_")


@pytest.mark.parametrize("code", [400, 401, 403, 404, 405, 413, 415, 422])
def test_statuses_that_will_not_pass_are_not(ask, server, code):
    server.queue(status(code))
    assert ask(server).error.status_code == code
    assert len(server.chats()) == 1


@pytest.mark.parametrize("code", [409, 429, 501, 503])
def test_the_servers_no_is_obeyed(ask, server, code):
    server.queue(status(code, headers={"x-should-retry": "false"}))
    assert ask(server).error.status_code == code
    assert len(server.chats()) == 1


def test_the_last_failure_is_raised_after_the_last_attempt(ask, server):
    server.queue(*(status(500, f"failure {i}") for i in range(6)))
    asked = ask(server)
    assert isinstance(asked.error, InternalServerError)
    assert "failure 4" in str(asked.error)
    assert len(server.chats()) == 5


def test_calls_are_retried_like_streams(call, server):
    server.queue(status(503), status(429))
    assert call(server, "chat", "x", model="fake").timings.retries == 2


def test_a_refused_connection_is_tried_again(call):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

    class Nobody:
        base_url = f"http://127.0.0.1:{port}"

    with pytest.raises(APIConnectionError, match=str(port)) as caught:
        call(Nobody, "models")
    assert caught.value.__cause__ is not None


def test_a_connection_lost_before_the_head_is_tried_again(call, server):
    server.queue([drop()])
    assert call(server, "chat", "x", model="fake").timings.retries == 1


@pytest.mark.parametrize("before", [[], [ping()]], ids=["nothing", "ping"])
def test_a_connection_cut_before_the_first_event_is_tried_again(ask, before):
    with FakeServer([*before, drop()]) as server:
        server.queue([*before, drop(), TextDelta("hi"), Finished("stop")])
        asked = ask(server)
    assert asked.final.text == "hi"
    assert asked.final.timings.retries == 1
    assert asked.final.request_id == "req_2"
    assert len(server.chats()) == 2


@pytest.mark.parametrize("seen", [Queued(1), TextDelta("hi")], ids=["event", "text"])
def test_nothing_is_sent_again_once_an_event_was_seen(ask, seen):
    with FakeServer([seen, drop(), Finished("stop")]) as server:
        asked = ask(server)
    assert isinstance(asked.error, StreamInterrupted)
    assert "the connection broke" in asked.error.reason
    assert len(server.chats()) == 1


def test_a_clean_end_without_an_event_is_not_tried_again(ask):
    with FakeServer([end()]) as server:
        assert isinstance(ask(server).error, StreamInterrupted)
    assert len(server.chats()) == 1


def test_retry_after_is_waited_for(ask, server):
    server.queue(status(429, headers={"retry-after-ms": "150", "retry-after": "30"}))
    began = time.monotonic()
    assert ask(server).final is not None
    assert 0.15 <= time.monotonic() - began < 29


def test_no_pause_goes_beyond_the_total_limit(ask, server):
    from kvrelay import Timeout

    server.queue(status(503, headers={"retry-after": "30"}))
    began = time.monotonic()
    asked = ask(server, timeout=Timeout(total=29.0))
    assert isinstance(asked.error, APIStatusError)
    assert asked.error.retry_after == 30
    assert time.monotonic() - began < 29


def test_no_retries_means_none(server):
    server.queue(status(503))
    client = Client(server.base_url, retries=Retries(max=0))
    with client, pytest.raises(InternalServerError):
        client.chat("x", model="fake")
    assert len(server.chats()) == 1


# --- the decision itself ---------------------------------------------------------------------


def test_retry_after_reads_milliseconds_seconds_and_dates():
    now = datetime(2030, 1, 1, tzinfo=UTC)
    later = format_datetime(now + timedelta(seconds=7))
    assert retry_after_s({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert retry_after_s({"retry-after": "0.5"}) == 0.5
    assert retry_after_s({"retry-after": later}, now) == 7
    assert retry_after_s({"retry-after": later.replace("+0000", "-0000")}, now) == 7
    assert retry_after_s({"retry-after": "-3"}) == 0
    assert retry_after_s({"retry-after-ms": "soon", "retry-after": "2"}) == 2
    assert retry_after_s({"retry-after": "soon"}) is None
    assert retry_after_s({"retry-after": "nan"}) is None
    assert retry_after_s({}) is None


@pytest.mark.parametrize("kind", ["connect", "connect_timeout", "cut"])
def test_lost_connections_are_worth_another_try(kind):
    assert pause_before_retry(Failure(kind, ""), used=0, policy=POLICY, dice=0.0) == 0.25


def test_a_limit_of_the_caller_is_not():
    assert pause_before_retry(Failure("timeout", ""), used=0, policy=POLICY, dice=0.0) is None


def test_pauses_double_up_to_the_cap_and_stop_at_the_last_attempt():
    policy = Retries(max=6)
    pauses = [
        pause_before_retry(Head(503, {}), used=used, policy=policy, dice=0.999999)
        for used in range(7)
    ]
    assert pauses[:6] == pytest.approx([0.5, 1, 2, 4, 8, 8], rel=1e-3)
    assert pauses[6] is None


@given(
    used=st.integers(0, 3),
    dice=st.floats(0, 1, exclude_max=True),
    asked=st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True).map(str)),
)
def test_a_pause_is_never_longer_than_the_policy_allows(used, dice, asked):
    headers = {} if asked is None else {"retry-after": asked}
    pause = pause_before_retry(Head(429, headers), used=used, policy=POLICY, dice=dice)
    assert 0 <= pause <= POLICY.retry_after_max_s * 1.1


@pytest.mark.parametrize("name", ["max", "backoff_s", "backoff_max_s", "retry_after_max_s"])
def test_a_policy_that_makes_no_sense_is_refused(name):
    with pytest.raises(ValueError, match=name):
        Retries(**{name: -1})
    with pytest.raises(ValueError, match=name):
        Retries(**{name: float("nan")})


def test_a_stream_cancelled_while_it_pauses_sends_nothing_more():
    import threading

    with FakeServer([drop()]) as server:
        patient = Retries(backoff_s=600, backoff_max_s=600)  # a pause of half of it at least
        with Client(server.base_url, retries=patient) as client:

            def cancel() -> None:
                while not server.chats():
                    time.sleep(0.01)
                time.sleep(0.2)  # for the client to notice that its connection is gone
                stream.cancel()

            began = time.monotonic()
            with client.stream("x", model="fake") as stream:
                cancelling = threading.Thread(target=cancel)
                cancelling.start()
                assert list(stream) == []
                cancelling.join()
        assert time.monotonic() - began < 300
        assert len(server.chats()) == 1
