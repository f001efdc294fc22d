"""kvrelay: the Python client.

    from kvrelay import Client

    with Client() as client, client.stream("Explain the with statement") as stream:
        for text in stream.text_stream:
            print(text, end="", flush=True)

Names load on first use, so `import kvrelay` costs next to nothing: no HTTP library, no torch, no
grpc. `kvrelay.testing` holds the fake server.
"""

from typing import TYPE_CHECKING

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncClient",
    "AsyncStream",
    "AsyncStreamManager",
    "AuthenticationError",
    "BadRequestError",
    "ChatOptions",
    "Client",
    "ConflictError",
    "ContextOverflowError",
    "Event",
    "Final",
    "Finished",
    "Health",
    "InternalServerError",
    "InvalidResponseError",
    "KvrelayClientError",
    "Message",
    "Model",
    "NotFoundError",
    "PermissionDeniedError",
    "QueueFull",
    "Queued",
    "RateLimitError",
    "RequestTimeoutError",
    "RequestTooLargeError",
    "Resumed",
    "Retries",
    "ServiceUnavailableError",
    "Started",
    "Stream",
    "StreamInterrupted",
    "StreamManager",
    "TextDelta",
    "Timeout",
    "Timings",
    "Tokens",
    "UnknownEvent",
    "Usage",
    "__version__",
]

# Type checkers read this block; at run time `__getattr__` finds the same names.
if TYPE_CHECKING:
    from kvrelay._async_client import AsyncClient, AsyncStream, AsyncStreamManager
    from kvrelay._client import Client, Stream, StreamManager
    from kvrelay._errors import (
        APIConnectionError,
        APIStatusError,
        APITimeoutError,
        AuthenticationError,
        BadRequestError,
        ConflictError,
        ContextOverflowError,
        InternalServerError,
        InvalidResponseError,
        KvrelayClientError,
        NotFoundError,
        PermissionDeniedError,
        QueueFull,
        RateLimitError,
        RequestTimeoutError,
        RequestTooLargeError,
        ServiceUnavailableError,
        StreamInterrupted,
    )
    from kvrelay._events import (
        Event,
        Finished,
        Queued,
        Resumed,
        Started,
        TextDelta,
        UnknownEvent,
        Usage,
    )
    from kvrelay._types import (
        ChatOptions,
        Final,
        Health,
        Message,
        Model,
        Retries,
        Timeout,
        Timings,
        Tokens,
    )

    __version__: str
else:
    _HOMES = {
        "_async_client": ("AsyncClient", "AsyncStream", "AsyncStreamManager"),
        "_client": ("Client", "Stream", "StreamManager"),
        "_events": (
            "Event",
            "Finished",
            "Queued",
            "Resumed",
            "Started",
            "TextDelta",
            "UnknownEvent",
            "Usage",
        ),
        "_types": (
            "ChatOptions",
            "Final",
            "Health",
            "Message",
            "Model",
            "Retries",
            "Timeout",
            "Timings",
            "Tokens",
        ),
    }
    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name: str) -> object:
        """Import a public name from its private module, once."""
        import importlib

        if name == "__version__":
            from importlib.metadata import version

            value = version("kvrelay")
        elif name in __all__:
            home = _HOME_OF.get(name, "_errors")
            value = getattr(importlib.import_module(f"kvrelay.{home}"), name)
        else:
            raise AttributeError(f"module 'kvrelay' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
