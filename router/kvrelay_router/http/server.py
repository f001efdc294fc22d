"""uvicorn as this router runs it: our socket, our signals, bounded heads, connections we can drop."""

import asyncio
import contextlib
import errno
import json
import logging
import secrets
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvrelay_protocol.errors import InvalidRequest, PortInUse, UsageError
from kvrelay_router.config import RouterConfig
from kvrelay_router.http.direct import EXTENSION, DirectClient
from kvrelay_router.http.errors import error_object
from kvrelay_router.http.outbox import Outbox

MAX_HEAD_BYTES = 64 * 1024
_BACKLOG = 2048
_FLUSH_S = 5
"""After a drain every answer has ended; this long for their last bytes to leave."""


class EdgeConfig(uvicorn.Config):
    """What the connections of one server share."""

    outbox: Outbox


class EdgeProtocol(HttpToolsProtocol):
    """One connection, with a bound on its request head, on silence before a request is complete, a
    short way for the pieces of an answer, and an abort for clients that read nothing.

    Closing a connection waits until the peer took what is buffered; a peer that never reads would
    hold its buffers for ever.
    """

    config: EdgeConfig
    silence_s = 30.0
    _in_head = False
    _head_bytes = 0
    _refused = False
    _silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._client = DirectClient(transport, self.flow, self.config.outbox)
        self._expect_bytes()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)
        self._client.lost()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self.scope["extensions"] = {EXTENSION: self._client}  # type: ignore[dict-item]
        self._expect_bytes()

    def on_headers_complete(self) -> None:
        self._in_head = False
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refuse_head()
            # The parser stops at an error in a callback; nothing of this request is handled.
            raise ValueError("the head is too large")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._expect_nothing()
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._silence is not None:
            self._expect_bytes()
        super().data_received(data)
        if self._in_head and not self._refused:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()

    def _refuse_head(self) -> None:
        self.send_400_response(f"the request's head exceeds {MAX_HEAD_BYTES} bytes")

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP request is answered like every other bad request."""
        if self._refused:
            return
        self._refused = True
        self._expect_nothing()
        if msg == "Invalid HTTP request received.":
            msg = "this is not a valid HTTP request"
        body = json.dumps(error_object(InvalidRequest(msg))).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: req_{secrets.token_hex(12)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _expect_bytes(self) -> None:
        self._expect_nothing()
        self._silence = self.loop.call_later(self.silence_s, self._too_silent)

    def _expect_nothing(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def _too_silent(self) -> None:
        self._silence = None
        awaited = self.cycle is None or self.cycle.response_complete or self.cycle.more_body
        # We may have stopped reading ourselves, or be busy with the request before this one.
        if awaited and not self.flow.read_paused and not self.transport.is_closing():
            self.transport.abort()


class EdgeServer(uvicorn.Server):
    """Leaves signals to the process: it drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def create_server(app: ASGIApp, config: RouterConfig) -> EdgeServer:
    """A server for one app; `serve(sockets=[...])` runs it until `should_exit`."""
    settings = EdgeConfig(
        app,
        http=EdgeProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        # Port scanners and the like get their 400; whoever runs this needs no warning of each.
        log_level="error",
        access_log=config.log_requests,
        # Only the access log names the peer behind a proxy.
        proxy_headers=config.log_requests,
        server_header=False,
        ssl_certfile=config.tls_cert,
        ssl_keyfile=config.tls_key,
        timeout_graceful_shutdown=_FLUSH_S,
    )
    settings.outbox = Outbox()
    server = EdgeServer(settings)
    if config.log_requests:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    return server


def listen(host: str, port: int) -> socket.socket:
    """Take the port.

    Raises:
        PortInUse: another process listens there.
        UsageError: the address isn't one of this machine's.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror or error}") from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Two sockets may bind one port while neither listens: only this takes it.
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} on {host} is in use; choose another with --port"
            ) from None
        raise UsageError(f"can't listen on {host}:{port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def check_tls(cert: Path | None, key: Path | None) -> None:
    """Read certificate and key once, before anything starts.

    Raises:
        UsageError: one is missing, or they don't fit together.
    """
    if cert is None and key is None:
        return
    if cert is None:
        raise UsageError("--tls-key needs --tls-cert")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(
            f"can't use TLS certificate {cert} with key {key or cert}: {reason}"
        ) from None
