"""API keys. Everything is closed except the routes named here."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kvrelay_protocol.errors import Unauthorized
from kvrelay_router.http.errors import error_response

PUBLIC_PATHS = frozenset({"/health", "/metrics", "/ping"})
TENANT = "kvrelay.tenant"
"""Key of an ASGI scope: which API key a request came with, as bytes that don't tell the key."""


def tenant_of(scope: Scope) -> bytes:
    """Whose request it is: 16 bytes that differ from key to key; empty where nobody needs one."""
    tenant: bytes = scope.get(TENANT, b"")
    return tenant


def _tenant(digest: bytes) -> bytes:
    return hashlib.blake2b(digest, digest_size=16, person=b"kvrelay-tenant").digest()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class RequireKey:
    """Answers 401 unless a known key comes as `Authorization: Bearer` or `x-api-key`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        """Args: no keys means no authentication. Only their digests are kept."""
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"] not in PUBLIC_PATHS:
            presented = _presented_keys(Headers(scope=scope))
            known = next(filter(self._knows, presented), None)
            if known is None:
                refusal = Unauthorized(
                    "incorrect API key"
                    if presented
                    else "no API key: send 'Authorization: Bearer <key>' or 'x-api-key'"
                )
                await error_response(refusal)(scope, receive, send)
                return
            scope[TENANT] = _tenant(_digest(known))
        await self._app(scope, receive, send)

    def _knows(self, key: str) -> bool:
        presented = _digest(key)
        # Every key is compared, so the time says nothing about which one is near.
        matches = [hmac.compare_digest(presented, known) for known in self._digests]
        return any(matches)


def _presented_keys(headers: Headers) -> list[str]:
    """Of both headers: a platform in front may have taken `Authorization` for a key of its own."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    keys = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
    return [key for key in keys if key]
