"""kvrelay: the Python client, and the offline engine.

    from kvrelay import Client

    with Client() as client, client.stream("Explain the with statement") as stream:
        for text in stream.text_stream:
            print(text, end="", flush=True)

`LLM` answers prompts in this process, without a server; see `kvrelay.offline`.

Names load on first use, so `import kvrelay` costs next to nothing: no HTTP library, no torch, no
grpc. `kvrelay.testing` holds the fake server.
"""

from typing import TYPE_CHECKING

__all__ = [
    "LLM",
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
    "ColdStart",
    "CompletionOutput",
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
    "RequestOutput",
    "RequestTimeoutError",
    "RequestTooLargeError",
    "Resumed",
    "Retries",
    "SamplingParams",
    "ServiceUnavailableError",
    "Started",
    "Stream",
    "StreamInterrupted",
    "StreamManager",
    "TextDelta",
    "TextPrompt",
    "Timeout",
    "Timings",
    "Tokens",
    "TokensPrompt",
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
        ColdStart,
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
    from kvrelay.offline.llm import LLM
    from kvrelay.offline.outputs import CompletionOutput, RequestOutput
    from kvrelay.offline.prompts import TextPrompt, TokensPrompt
    from kvrelay.offline.sampling_params import SamplingParams

    __version__: str
else:
    _HOMES = {
        "_async_client": ("AsyncClient", "AsyncStream", "AsyncStreamManager"),
        "_client": ("Client", "Stream", "StreamManager"),
        "_events": (
            "ColdStart",
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
        "offline.llm": ("LLM",),
        "offline.outputs": ("CompletionOutput", "RequestOutput"),
        "offline.prompts": ("TextPrompt", "TokensPrompt"),
        "offline.sampling_params": ("SamplingParams",),
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
            if name == "LLM":
                _check_offline_engine()
            value = getattr(importlib.import_module(f"kvrelay.{home}"), name)
        else:
            raise AttributeError(f"module 'kvrelay' has no attribute {name!r}")
        globals()[name] = value
        return value

    def _check_offline_engine() -> None:
        """Say at once, in one line, what the client's own installation lacks."""
        from importlib.util import find_spec

        for package in ("torch", "tokenizers", "jinja2"):
            try:
                found = find_spec(package) is not None
            except ImportError:
                found = False
            if not found:
                raise ImportError(
                    f"kvrelay.LLM needs {package}, which is not installed: pip install 'kvrelay[all]'",
                    name=package,
                )

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
