"""Server-sent events: our own encoder.

Rules measured against real clients: one JSON per `data:` line, no `id:` or lone `retry:`, named
events only for clients that asked for them, `[DONE]` exactly once.
"""

import json
from collections.abc import Mapping
from typing import Any

_quote = json.encoder.encode_basestring_ascii
"""What `json.dumps` does with a string, past the rest of it."""

DONE = b"data: [DONE]\n\n"
PING_COMMENT = b": ping\n\n"
PING_EVENT = b"event: ping\ndata: {}\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


def dump(value: Any) -> str:
    """Compact JSON in ASCII: some clients split lines at U+2028 and U+0085, which JSON leaves raw."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def data_frame(value: Any) -> bytes:
    """An ordinary event."""
    return f"data: {dump(value)}\n\n".encode("ascii")


def named_frame(event: str, value: Mapping[str, Any]) -> bytes:
    """An event of the SDK's protocol."""
    return f"event: {event}\ndata: {dump(value)}\n\n".encode("ascii")


class SplicedFrame:
    """A chunk rendered once, into which only the text of each delta is spliced."""

    _MARK = "\x00text\x00"

    def __init__(self, chunk: Mapping[str, Any]) -> None:
        """Args: `chunk` holds `SplicedFrame.HOLE` where the text goes."""
        before, _, after = dump(chunk).partition(dump(self._MARK))
        self._before, self._after = f"data: {before}", f"{after}\n\n"

    HOLE = _MARK

    def render(self, text: str) -> bytes:
        return f"{self._before}{_quote(text)}{self._after}".encode("ascii")
