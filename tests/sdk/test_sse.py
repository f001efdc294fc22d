import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay import _sse
from kvrelay._sse import EventTooLargeError, ServerSentEvent, SSEDecoder


def decode(data: bytes) -> list[ServerSentEvent]:
    return SSEDecoder().feed(data)


def naive(data: bytes) -> list[ServerSentEvent]:
    """The specification read aloud: whole text, line by line."""
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    lines = re.split(r"\r\n|\r|\n", text)[:-1]
    events, name, values, last_id = [], "", [], ""
    for line in lines:
        if not line:
            if values:
                events.append(ServerSentEvent(name, "\n".join(values), last_id))
            name, values = "", []
            continue
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if key == "data":
            values.append(value)
        elif key == "event":
            name = value
        elif key == "id" and "\0" not in value:
            last_id = value
    return events


_TEXT = st.text(st.sampled_from("ab :\0é漢😀\ufeff"), max_size=6)
_LINE = st.one_of(
    st.builds("data:{}".format, _TEXT),
    st.builds("data: {}".format, _TEXT),
    st.builds("event: {}".format, _TEXT),
    st.builds("id: {}".format, _TEXT),
    st.builds(":{}".format, _TEXT),
    st.sampled_from(["", "", "", "data", "retry: 10", "retry: x", "other: y"]),
)
_STREAM = st.builds(
    lambda bom, lines: bom + b"".join(line.encode() + end for line, end in lines),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.lists(st.tuples(_LINE, st.sampled_from([b"\n", b"\r", b"\r\n"])), max_size=20),
)


@given(data=_STREAM, cuts=st.lists(st.integers(0, 300), max_size=12))
def test_any_chunking_gives_the_same_events(data, cuts):
    decoder, events, start = SSEDecoder(), [], 0
    for cut in sorted({*(min(cut, len(data)) for cut in cuts), len(data)}):
        events += decoder.feed(data[start:cut])
        start = cut
    assert events == naive(data)


@given(data=_STREAM)
def test_byte_by_byte_equals_all_at_once(data):
    decoder = SSEDecoder()
    events = [event for i in range(len(data)) for event in decoder.feed(data[i : i + 1])]
    assert events == decode(data)


@given(data=st.binary(max_size=200))
def test_no_bytes_make_it_fail(data):
    decode(data)


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"data: a\n\n", [("", "a")]),
        (b"data:a\r\r", [("", "a")]),
        (b"data:  a\r\n\r\n", [("", " a")]),
        (b"data: a\ndata: b\n\n", [("", "a\nb")]),
        (b"data\n\n", [("", "")]),
        (b"event: ping\n\n", []),
        (b"event: x\ndata: 1\n\ndata: 2\n\n", [("x", "1"), ("", "2")]),
        (b": comment\n\ndata: 1\n\n", [("", "1")]),
        (b"data: unfinished\n", []),
        (b"data: \xff\n\n", [("", "\ufffd")]),
    ],
)
def test_fields(data, events):
    assert [(event.name, event.data) for event in decode(data)] == events


def test_id_lasts_and_retry_is_kept():
    decoder = SSEDecoder()
    events = decoder.feed(b"id: 7\nretry: 250\ndata: a\n\ndata: b\n\nid\ndata: c\n\n")
    assert [event.id for event in events] == ["7", "7", ""]
    assert decoder.retry_ms == 250


def test_an_endless_event_is_refused(monkeypatch):
    monkeypatch.setattr(_sse, "MAX_EVENT_BYTES", 100)
    decoder = SSEDecoder()
    decoder.feed(b"data: " + b"x" * 90)
    with pytest.raises(EventTooLargeError):
        decoder.feed(b"x" * 20)
    many_lines = SSEDecoder()
    with pytest.raises(EventTooLargeError):
        for _ in range(20):
            many_lines.feed(b"data: 12345\n")
