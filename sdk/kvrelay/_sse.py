"""Server-sent events, decoded without I/O.

Follows the WHATWG "event stream interpretation": lines end in CR, LF or CRLF, a blank line ends an
event, an event without data is not dispatched, an unfinished event at the end of the stream is
dropped. Works on bytes, so a chunk may end anywhere, also inside a character.
"""

import re
from dataclasses import dataclass

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BOM = b"\xef\xbb\xbf"

MAX_EVENT_BYTES = 16 * 1024 * 1024
"""An event larger than this is an attack or a defect, not an answer."""


class EventTooLargeError(ValueError):
    """The server sent one event beyond `MAX_EVENT_BYTES`."""


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One dispatched event."""

    name: str
    """The `event:` field; empty where there was none."""
    data: str
    id: str
    """The last `id:` seen on this stream, on this event or before."""


class SSEDecoder:
    """Feed bytes, get events. One decoder serves one response."""

    def __init__(self) -> None:
        self._rest = b""  # the line that has not ended yet
        self._skip_lf = False  # the last chunk ended in CR: an LF first thing belongs to it
        self._first_line = True
        self._name = ""
        self._data: list[str] = []
        self._size = 0  # bytes of the event being collected
        self._last_id = ""
        self.retry_ms: int | None = None
        """The reconnection time the server last asked for."""

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes and return the events they complete."""
        if not chunk:
            return []
        if self._skip_lf and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._skip_lf = chunk.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + chunk)
        events = [event for line in lines if (event := self._line(line)) is not None]
        if self._size + len(self._rest) > MAX_EVENT_BYTES:
            raise EventTooLargeError(f"one event exceeds {MAX_EVENT_BYTES} bytes")
        return events

    def _line(self, line: bytes) -> ServerSentEvent | None:
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        self._size += len(line)
        # Lines are whole here, so a replacement character means that the server sent bad UTF-8.
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        match name:
            case "data":
                self._data.append(value)
            case "event":
                self._name = value
            case "id" if "\0" not in value:
                self._last_id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry_ms = int(value)
            case _:  # a comment (its name is empty) or a field nobody defined
                pass
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        name, data = self._name, self._data
        self._name, self._data, self._size = "", [], 0
        return ServerSentEvent(name, "\n".join(data), self._last_id) if data else None
