"""Server-sent events: our own encoder.

Rules measured against real clients: one JSON per `data:` line, no `id:` or lone `retry:`, named
events only for clients that asked for them, `[DONE]` exactly once.
"""

import json
from collections.abc import Mapping
from typing import Any

quote = json.encoder.encode_basestring_ascii
"""What `json.dumps` does with a string, past the rest of it."""

DONE = b"data: [DONE]\n\n"
PING_COMMENT = b": ping\n\n"
PING_EVENT = b"event: ping\ndata: {}\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


_compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def dump(value: Any) -> str:
    """Compact JSON in ASCII: some clients split lines at U+2028 and U+0085, which JSON leaves raw."""
    return _compact.encode(value)


def data_frame(value: Any) -> bytes:
    """An ordinary event."""
    return f"data: {dump(value)}\n\n".encode("ascii")


def named_frame(event: str, value: Mapping[str, Any]) -> bytes:
    """An event of the SDK's protocol."""
    return f"event: {event}\ndata: {dump(value)}\n\n".encode("ascii")


class Chunks:
    """The chunks of one answer: rendered once, so that a token costs only its own text."""

    def __init__(self, base: Mapping[str, Any], *, usage_in_all: bool) -> None:
        """Args: with `usage_in_all` every chunk has the key, null until the last."""
        self._start = f"data: {dump(base)[:-1]},"
        self._end = ',"usage":null}\n\n' if usage_in_all else "}\n\n"

    def render(
        self,
        index: int,
        content: str,
        reason: str | None = None,
        *,
        usage: Mapping[str, Any] | None = None,
    ) -> bytes:
        """A chunk with one choice.

        Args:
            index: of the answer.
            content: the part of a choice that is this endpoint's own, as JSON.
            reason: why the answer ended, where it did.
            usage: instead of null.
        """
        end = self._end if usage is None else f',"usage":{dump(usage)}}}\n\n'
        why = "null" if reason is None else quote(reason)
        chunk = f'{self._choice(index)}{content},"logprobs":null,"finish_reason":{why}}}]{end}'
        return chunk.encode("ascii")

    def with_text(self, index: int, before: str, after: str) -> "TextFrame":
        """The chunk of an ordinary delta: what stands around the text in a choice is the endpoint's."""
        end = f'{after},"logprobs":null,"finish_reason":null}}]{self._end}'
        return TextFrame(self._choice(index) + before, end)

    def _choice(self, index: int) -> str:
        return f'{self._start}"choices":[{{"index":{index},'

    def without_choices(self, usage: Mapping[str, Any]) -> bytes:
        """The chunk that only counts."""
        return f'{self._start}"choices":[],"usage":{dump(usage)}}}\n\n'.encode("ascii")


class TextFrame:
    """A chunk rendered once, into which only the text of each delta is spliced."""

    __slots__ = ("_after", "_before")

    def __init__(self, before: str, after: str) -> None:
        self._before, self._after = before, after

    def render(self, text: str) -> bytes:
        return (self._before + quote(text) + self._after).encode("ascii")
