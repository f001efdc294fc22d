"""The short way to a client's socket: what is written, when, and that nothing overtakes anything."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_router.http import outbox as outbox_module
from kvrelay_router.http.chat import ChatFrames
from kvrelay_router.http.completions import CompletionFrames
from kvrelay_router.http.direct import DirectClient
from kvrelay_router.http.outbox import Outbox

CROWD = outbox_module._CROWD


class Transport:
    def __init__(self):
        self.written = []
        self.closing = self.aborted = False

    def write(self, data):
        self.written.append(data)

    def is_closing(self):
        return self.closing

    def abort(self):
        self.aborted = True


class Flow:
    write_paused = False


def clients(outbox, count):
    return [DirectClient(Transport(), Flow(), outbox) for _ in range(count)]


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_lone_token_is_written_at_the_end_of_its_turn():
    (client,) = clients(Outbox(), 1)
    client.write(b"one")
    assert client._transport.written == []
    await turns(1)
    assert client._transport.written == [b"3\r\none\r\n"]


async def test_all_of_a_turn_is_one_write():
    (client,) = clients(Outbox(), 1)
    for piece in (b"a", b"b" * 20, b"c"):
        client.write(piece)
    await turns(1)
    assert client._transport.written == [b"16\r\na" + b"b" * 20 + b"c\r\n"]
    client.write(b"d")
    await turns(1)
    assert client._transport.written[1:] == [b"1\r\nd\r\n"]


async def test_a_big_step_joins_the_one_behind_it():
    many = clients(Outbox(), CROWD)
    for client in many:
        client.write(b"1")
    await turns(1)
    for client in many:  # the next step was there already
        client.write(b"2")
    await turns(10)
    assert all(client._transport.written == [b"2\r\n12\r\n"] for client in many)


async def test_a_big_step_with_nothing_behind_it_leaves_within_turns():
    many = clients(Outbox(), CROWD)
    for client in many:
        client.write(b"1")
    await turns(outbox_module._QUIET_TURNS + 1)
    assert all(client._transport.written == [b"1\r\n1\r\n"] for client in many)


async def test_steps_without_end_are_not_held_for_ever():
    many = clients(Outbox(), CROWD)
    for _ in range(3 * outbox_module._MAX_ROUNDS):
        for client in many:
            client.write(b"x")
        await turns(1)
    assert all(len(client._transport.written) >= 2 for client in many)


async def test_a_flush_keeps_the_order_and_leaves_nothing_for_later():
    (client,) = clients(Outbox(), 1)
    client.write(b"before")
    client.flush()
    client._transport.write(b"after")
    await turns(2)
    assert client._transport.written == [b"6\r\nbefore\r\n", b"after"]


async def test_nothing_is_written_to_a_connection_that_closes():
    gone, there = clients(Outbox(), 2)
    gone.write(b"x")
    there.write(b"y")
    gone._transport.closing = True
    await turns(1)
    assert gone._transport.written == []
    assert there._transport.written == [b"1\r\ny\r\n"]


async def test_a_lost_connection_is_told_once_also_to_a_late_watcher():
    early, late = clients(Outbox(), 2)
    told = []
    early.watch(lambda: told.append("early"))
    early.lost()
    assert told == ["early"]
    late.lost()
    late.watch(lambda: told.append("late"))
    assert told == ["early"]
    await turns(1)
    assert told == ["early", "late"]


async def test_an_ended_watch_hears_nothing():
    (client,) = clients(Outbox(), 1)
    told = []
    client.watch(lambda: told.append("x"))
    client.watch(None)
    client.lost()
    await turns(1)
    assert told == []


def test_behind_is_what_the_server_says():
    (client,) = clients(Outbox(), 1)
    assert not client.behind
    client._flow.write_paused = True
    assert client.behind


def plain(frame):
    assert frame.startswith(b"data: ") and frame.endswith(b"\n\n")
    return json.loads(frame.removeprefix(b"data: "))


@pytest.mark.parametrize("include_usage", [False, True])
@given(text=st.text(max_size=20), index=st.integers(0, 15), name=st.text(max_size=10))
def test_prepared_frames_are_the_objects_they_stand_for(include_usage, text, index, name):
    usage = {"usage": None} if include_usage else {}
    counts = {"completion_tokens": 3}
    base = {"id": "a", "created": 5, "model": name}
    frames = ChatFrames("a", 5, name, include_usage=include_usage)

    def chat(delta, reason=None):
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**base, "object": "chat.completion.chunk", "choices": [choice], **usage}

    assert plain(frames.opening(index)) == chat({"role": "assistant", "content": ""})
    assert plain(frames.delta(index, text, None)) == chat({"content": text})
    assert plain(frames.delta(index, text, counts)) == {**chat({"content": text}), "usage": counts}
    assert plain(frames.finish(index, "stop")) == chat({}, "stop")
    assert plain(frames.usage(counts))["choices"] == []
    assert plain(frames.usage(counts))["usage"] == counts

    frames = CompletionFrames("a", 5, name, include_usage=include_usage)

    def completion(words, reason=None):
        choice = {"index": index, "text": words, "logprobs": None, "finish_reason": reason}
        return {**base, "object": "text_completion", "choices": [choice], **usage}

    assert frames.opening(index) == b""
    assert plain(frames.delta(index, text, None)) == completion(text)
    assert plain(frames.delta(index, text, counts)) == {**completion(text), "usage": counts}
    assert plain(frames.finish(index, "length")) == completion("", "length")
