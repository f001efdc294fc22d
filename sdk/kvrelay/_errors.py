"""What can go wrong, as the caller sees it.

```
KvrelayClientError
├── APIConnectionError             no answer: refused, reset, unreachable, wrong certificate
│   └── APITimeoutError            a limit of `Timeout` passed; `phase` names it
├── APIStatusError                 an answer that is no 2xx; code, type, param, request_id
│   ├── BadRequestError            400
│   │   └── ContextOverflowError   400 context_length_exceeded; limit, requested
│   ├── AuthenticationError        401
│   ├── PermissionDeniedError      403
│   ├── NotFoundError              404
│   ├── RequestTimeoutError        408
│   ├── ConflictError              409
│   ├── RequestTooLargeError       413
│   ├── RateLimitError             429
│   │   └── QueueFull              429 queue_full; retry_after
│   └── InternalServerError        500 and above
│       └── ServiceUnavailableError  503
├── InvalidResponseError           a 2xx that is not what this API says
└── StreamInterrupted              the answer broke off; partial, reason, the server's code
```

Names match the openai package where it has the same notion. No prompt enters a message of ours.
"""

from typing import Literal, TypeAlias

Phase: TypeAlias = Literal["connect", "first_token", "idle", "total"]


class KvrelayClientError(Exception):
    """Root of the tree."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class APIConnectionError(KvrelayClientError):
    """No answer arrived."""


class APITimeoutError(APIConnectionError):
    """A limit of `Timeout` passed."""

    def __init__(self, message: str, *, phase: Phase = "total", partial: str = "") -> None:
        super().__init__(message)
        self.phase: Phase = phase
        self.partial = partial


class APIStatusError(KvrelayClientError):
    """The server answered, and the answer is an error."""

    def __init__(
        self,
        message: str,
        *,
        status_code: int = 0,
        code: str | None = None,
        type: str | None = None,  # noqa: A002 - the wire's and the openai package's name
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code
        self.type = type
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after
        """Seconds the server asked to wait."""


class BadRequestError(APIStatusError):
    """400: a field is missing, of the wrong type or out of range."""


class ContextOverflowError(BadRequestError):
    """Prompt and `max_tokens` together exceed the model's context."""

    limit: int | None = None
    """The model's context in tokens, where the server named it."""
    requested: int | None = None
    """What the request needed, where the server named it."""


class AuthenticationError(APIStatusError):
    """401: no API key, or one this server does not know."""


class PermissionDeniedError(APIStatusError):
    """403: the key is known and may not do this."""


class NotFoundError(APIStatusError):
    """404: unknown model or route; `code` tells which."""


class RequestTimeoutError(APIStatusError):
    """408: the request's deadline passed in the queue."""


class ConflictError(APIStatusError):
    """409: the idempotency key belongs to a different request."""


class RequestTooLargeError(APIStatusError):
    """413: the body exceeds the server's limit."""


class RateLimitError(APIStatusError):
    """429: too many requests."""


class QueueFull(RateLimitError):
    """The bounded admission queue is full; `retry_after` says when to come back."""


class InternalServerError(APIStatusError):
    """500 and above."""


class ServiceUnavailableError(InternalServerError):
    """503: no worker, or the server is shutting down."""


class InvalidResponseError(KvrelayClientError):
    """A success that this client can't read: probably not a kvrelay (or OpenAI-style) server."""


class StreamInterrupted(KvrelayClientError):
    """The stream ended before the answer did. `partial` is not the answer."""

    def __init__(
        self,
        reason: str,
        *,
        partial: str = "",
        code: str | None = None,
        type: str | None = None,  # noqa: A002 - as in APIStatusError
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.partial = partial
        self.code = code
        """The server's code where it sent an error frame; None where the connection broke."""
        self.type = type
        self.param = param
        self.request_id = request_id
