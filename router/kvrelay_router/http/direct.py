"""The short way from an answer to its client's socket, where the server is ours.

ASGI's `send` is a coroutine through several layers, for every chunk. An answer's head and its end go
that way; what lies between, a piece for every token, is written to the connection at once.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from starlette.types import Scope
from uvicorn.protocols.http.flow_control import FlowControl

from kvrelay_router.http.outbox import Outbox

EXTENSION = "kvrelay.client"
"""Scope extension of our server: the connection's `DirectClient`."""


class DirectClient:
    """One connection. Belongs to the answer that is being sent on it; there is one at a time."""

    def __init__(self, transport: asyncio.Transport, flow: FlowControl, outbox: Outbox) -> None:
        self._on_lost: Callable[[], None] | None = None
        self._is_lost = False
        self._transport = transport
        self._flow = flow
        self._outbox = outbox
        self._pieces: list[bytes] = []

    def watch(self, gone: Callable[[], None] | None) -> None:
        """Call `gone` once when the connection is gone, soon if it is already; None ends the watch."""
        self._on_lost = gone
        if gone is not None and self._is_lost:
            asyncio.get_running_loop().call_soon(gone)

    @property
    def behind(self) -> bool:
        """The client does not keep up: pieces belong into `send`, which waits for it."""
        return self._flow.write_paused

    def write(self, body: bytes) -> None:
        """Write a piece of a chunked body; its head must be out."""
        if self._pieces:
            self._outbox.added += 1
        else:
            self._outbox.add(self.flush)
        self._pieces.append(body)

    def flush(self) -> None:
        """Write what was taken; before any `send`."""
        if not self._pieces:
            return
        body = b"".join(self._pieces)
        self._pieces.clear()
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def abort(self) -> None:
        """Drop the connection without flushing what a stuck client owes."""
        self._pieces.clear()
        self._transport.abort()

    def lost(self) -> None:
        """For the server: the connection is gone."""
        self._is_lost = True
        self._pieces.clear()
        if self._on_lost is not None:
            self._on_lost()


def direct_client(scope: Scope) -> DirectClient | None:
    """The short way, or None where another server runs the app."""
    return cast("DirectClient | None", scope.get("extensions", {}).get(EXTENSION))
