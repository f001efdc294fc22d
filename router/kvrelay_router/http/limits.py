"""Bounds that hold before any work: body size and content type."""

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvrelay_protocol.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType
from kvrelay_router.http.errors import error_response


class BoundedBody:
    """Refuses bodies over the limit, by their declared length and again while they arrive."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not (declared.isascii() and declared.isdigit()):
            error = InvalidRequest("Content-Length is not a number of bytes")
            await error_response(error)(scope, receive, send)
            return
        # Longer than any limit, and longer than int() accepts.
        if len(declared) > 18 or int(declared) > self._max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"the request body exceeds this server's limit of {self._max_bytes} bytes"
        )


def require_json(headers: Mapping[str, str]) -> None:
    """Refuse a body that isn't declared as JSON.

    Raises:
        UnsupportedMediaType: any other content type, none, or a compressed body.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"identity", ""}:
        raise UnsupportedMediaType(
            f"Content-Encoding {encoding[:100]} is not supported; send the body as it is",
        )
    given = headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType(
            f"Content-Type must be application/json, not {given[:100] or 'absent'}",
        )
