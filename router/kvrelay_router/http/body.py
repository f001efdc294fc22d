"""Reading a request's body: bytes, JSON, schema."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.types import Receive

from kvrelay_protocol.errors import ClientGone, InvalidRequest
from kvrelay_router.http.errors import describe
from kvrelay_router.http.limits import require_json
from kvrelay_router.http.schemas import Schema

S = TypeVar("S", bound=Schema)
R = TypeVar("R")

# Above this many bytes rendering and tokenising leave the event loop to a thread.
_INLINE_BYTES = 4 * 1024


async def read_object(headers: Mapping[str, str], receive: Receive) -> tuple[dict[str, Any], int]:
    """The body as a JSON object, and its size in bytes.

    Raises:
        InvalidRequest: it is none.
        ClientGone: the client left while sending it.
    """
    require_json(headers)
    body = await _read(receive)
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(parsed, dict):
        raise InvalidRequest("the body must be a JSON object")
    return parsed, len(body)


async def _read(receive: Receive) -> bytes:
    pieces: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left while sending its request")
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


def parse(schema: type[S], raw: Mapping[str, Any]) -> S:
    """Check a body against its schema.

    Raises:
        InvalidRequest: it does not fit.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise describe(error.errors(include_url=False, include_context=False)) from None


async def off_loop(size: int, work: Callable[[], R]) -> R:
    """Run CPU work here if the body was small, else in a thread."""
    return work() if size <= _INLINE_BYTES else await asyncio.to_thread(work)
