"""Every failure in the one shape clients parse: `{"error": {message, type, param, code}}`."""

import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvrelay_protocol.errors import (
    InternalError,
    InvalidRequest,
    KvrelayError,
    MethodNotAllowed,
    NotFound,
)
from kvrelay_router.http.request_id import request_id_of

logger = logging.getLogger(__name__)

# openai-python never retries above 120 s, openai-node ignores anything above 60 s.
MAX_RETRY_AFTER_S = 60
_RETRY_STATUS = (429, 503)

# Pydantic's own words for these name Python's types.
_WORDS = {
    "missing": "is required",
    "model_type": "must be an object",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "list_type": "must be a list",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
}


class UnsupportedParameter(InvalidRequest):
    """A parameter that would change the answer and isn't built yet."""

    code = "unsupported_parameter"


def error_object(error: KvrelayError) -> dict[str, Any]:
    """The body of an error, and of an error frame."""
    return {
        "error": {
            "message": error.message,
            "type": error.wire_type,
            "param": error.param,
            "code": error.code,
        },
    }


def error_response(error: KvrelayError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A response with the error's status."""
    merged = dict(headers or {})
    if error.http_status in _RETRY_STATUS:
        wait = math.ceil(error.retry_after_s or 1.0)
        merged["Retry-After"] = str(min(max(wait, 1), MAX_RETRY_AFTER_S))
    if error.should_retry is not None:
        merged["x-should-retry"] = str(error.should_retry).lower()
    if error.http_status == 401:
        merged["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_object(error), error.http_status, merged)


def internal_error(request_id: str) -> InternalError:
    """What a client learns of a defect."""
    return InternalError(f"internal error; the server's log has it under request id {request_id}")


def log_defect(error: BaseException, request_id: str) -> None:
    """Log where it happened. The exception's text stays out: it may hold prompt text."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s: %s\n%s", request_id, type(error).__name__, frames)


def describe(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """Pydantic's findings as one error: at most 10 of them, 200 characters of input each."""
    lines = [_describe_one(found) for found in errors[:10]]
    if len(errors) > len(lines):
        lines.append(f"and {len(errors) - len(lines)} more")
    return InvalidRequest("; ".join(lines), param=_where(errors[0]["loc"]) or None)


def _describe_one(found: Mapping[str, Any]) -> str:
    text = _WORDS.get(found["type"]) or str(found["msg"]).replace("Input should be", "must be")
    line = f"{_where(found['loc']) or 'body'}: {text}"
    value = found.get("input")
    # Numbers help; text may be a prompt, and objects amplify.
    if isinstance(value, bool | int | float) and found["type"] != "missing":
        line += f" (got {value!r:.200})"
    return line[:400]


def _where(path: Sequence[str | int]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.lstrip(".")[:200]


def install_error_handlers(app: FastAPI) -> None:
    """Map our tree, the framework's own HTTP errors, and the unforeseen."""
    app.add_exception_handler(KvrelayError, _on_kvrelay_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_defect)


async def _on_kvrelay_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, KvrelayError)  # noqa: S101 (registered for this class)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 (registered for this class)
    if error.status_code == 404:
        return error_response(NotFound(f"no route {request.url.path[:200]}"))
    if error.status_code == 405:
        message = f"{request.method} is not allowed on {request.url.path[:200]}"
        return error_response(MethodNotAllowed(message), error.headers)
    return error_response(InvalidRequest(str(error.detail)[:200]), error.headers)


async def _on_defect(request: Request, _error: Exception) -> Response:
    # Only renders. The framework raises the exception again, and LastResort logs it.
    return error_response(internal_error(request_id_of(request.scope)))


class LastResort:
    """Outermost: whatever escapes is logged without its text, never printed by the server.

    Where the head is already out the connection is left unfinished, which the server answers by
    cutting it: a truncated answer never looks complete.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            request_id = request_id_of(scope)
            log_defect(error, request_id)
            if not started:
                await error_response(internal_error(request_id))(scope, receive, send)
