import socket
import time

import pytest
from growing_limit import with_growing_limit

from kvrelay import APITimeoutError, Client, Finished, Queued, TextDelta, Timeout
from kvrelay.testing import FakeServer, delay, ping

A, B, DONE = TextDelta("a"), TextDelta("b"), Finished("stop")
NEVER = delay(600)
SOON_S = 60
"""Far below what is never or a default limit, far above what any machine needs."""


def pinging(seconds, every):
    """Signs of life for at least that long."""
    return [step for _ in range(int(seconds / every) + 1) for step in (ping(), delay(every))]


@pytest.mark.parametrize(
    ("script", "phase", "partial"),
    [
        ([A, NEVER], "idle", "a"),
        ([Queued(1), NEVER], "idle", ""),
        ([Queued(1), NEVER], "first_token", ""),
        ([Queued(1), *pinging(600, 0.05)], "first_token", ""),
        ([A, *pinging(600, 0.05)], "total", "a"),
        ([A, NEVER], "total", "a"),
    ],
    ids=["idle", "idle-queued", "first", "first-pinged", "total-pinged", "total"],
)
def test_a_limit_that_passes_is_named_and_timely(ask, script, phase, partial):
    def check(limit):
        began = time.monotonic()
        with FakeServer(script) as server:
            asked = ask(server, timeout=Timeout(**{phase: limit}))
            assert server.requests[0].client_left()
        assert isinstance(asked.error, APITimeoutError)
        assert (asked.error.phase, asked.error.partial) == (phase, partial)
        assert f"Timeout.{phase}" in str(asked.error)
        assert limit <= time.monotonic() - began < limit + SOON_S
        assert len(server.chats()) == 1

    with_growing_limit(check, 0.4)


def test_the_first_token_limit_no_longer_counts_after_it(ask):
    def check(limit):
        with FakeServer([A, delay(1.3 * limit), B, DONE]) as server:
            assert ask(server, timeout=Timeout(first_token=limit)).final.text == "ab"

    with_growing_limit(check, 0.6)


def test_pings_keep_an_idle_stream_alive(ask):
    def check(limit):
        with FakeServer([A, *pinging(1.3 * limit, limit / 15), B, DONE]) as server:
            assert ask(server, timeout=Timeout(idle=limit)).final.text == "ab"

    with_growing_limit(check, 0.9)


def test_a_slow_reader_is_not_an_idle_server():
    def check(limit):
        with (
            FakeServer([A, B, DONE]) as server,
            Client(server.base_url, timeout=Timeout(idle=limit)) as client,
            client.stream("x", model="fake") as stream,
        ):
            next(stream)
            time.sleep(1.5 * limit)
            assert stream.final_text() == "ab"

    with_growing_limit(check, 0.6)


def silent_listener():
    """Accepts into its backlog and never answers."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(8)
    return listener


class At:
    def __init__(self, listener):
        self.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("timeout", "phase"),
    [(Timeout(first_token=0.3), "first_token"), (Timeout(total=0.3), "total")],
)
def test_a_server_that_never_answers_a_stream(ask, timeout, phase):
    with silent_listener() as listener:
        began = time.monotonic()
        asked = ask(At(listener), timeout=timeout)
        assert asked.error.phase == phase
        assert 0.3 <= time.monotonic() - began < SOON_S


@pytest.mark.parametrize(
    ("method", "timeout", "phase"),
    [("chat", Timeout(total=0.3), "total"), ("models", Timeout(idle=0.3), "idle")],
)
def test_a_server_that_never_answers_a_call(call, method, timeout, phase):
    with silent_listener() as listener:
        args = ("x",) if method == "chat" else ()
        options = {"model": "fake"} if method == "chat" else {}
        began = time.monotonic()
        with pytest.raises(APITimeoutError) as caught:
            call(At(listener), method, *args, client={"timeout": timeout}, **options)
        assert caught.value.phase == phase
        assert 0.3 <= time.monotonic() - began < SOON_S


def test_no_limits_at_all(ask, server):
    unlimited = Timeout(connect=None, first_token=None, idle=None, total=None)
    assert ask(server, timeout=unlimited).final.text == "Hello world"


@pytest.mark.parametrize("name", ["connect", "first_token", "idle", "total"])
def test_a_limit_that_makes_no_sense_is_refused(name):
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=name):
            Timeout(**{name: value})
