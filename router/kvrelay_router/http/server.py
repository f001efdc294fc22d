"""uvicorn as this router runs it: our socket, our signals, bounded heads, connections we can drop."""

import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvrelay_protocol.errors import PortInUse, UsageError
from kvrelay_router.config import RouterConfig
from kvrelay_router.http.answer import ABORT_EXTENSION

MAX_HEAD_BYTES = 64 * 1024
_BACKLOG = 2048
_FLUSH_S = 5
"""After a drain every answer has ended; this long for their last bytes to leave."""


class EdgeProtocol(HttpToolsProtocol):
    """One connection, with a bound on its request head and an abort for clients that read nothing.

    Closing a connection waits until the peer took what is buffered; a peer that never reads would
    hold its buffers for ever.
    """

    _in_head = False
    _head_bytes = 0

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self.scope["extensions"] = {ABORT_EXTENSION: self.transport.abort}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._in_head = False
                self.send_400_response("The request's head is too large.")


class EdgeServer(uvicorn.Server):
    """Leaves signals to the process: it drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def create_server(app: ASGIApp, config: RouterConfig) -> EdgeServer:
    """A server for one app; `serve(sockets=[...])` runs it until `should_exit`."""
    return EdgeServer(
        uvicorn.Config(
            app,
            http=EdgeProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=config.log_requests,
            server_header=False,
            ssl_certfile=config.tls_cert,
            ssl_keyfile=config.tls_key,
            timeout_graceful_shutdown=_FLUSH_S,
        ),
    )


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
