import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvrelay import (
    AsyncClient,
    AsyncStream,
    Client,
    Event,
    Final,
    KvrelayClientError,
    Retries,
    Stream,
)
from kvrelay.pytest_plugin import kvrelay_server
from kvrelay.testing import FakeServer

# `pytest_plugins` works in the top conftest only.
__all__ = ["kvrelay_server"]

QUICK = Retries(max=4, backoff_s=0.01, backoff_max_s=0.02)


@dataclass
class Asked:
    """What became of one request."""

    events: list[Event] = field(default_factory=list)
    final: Final | None = None
    error: KvrelayClientError | None = None
    stream: Stream | AsyncStream | None = None


def _ask(base_url: str, messages: Any, options: dict[str, Any], **client: Any) -> Asked:
    asked = Asked()
    with Client(base_url, **{"retries": QUICK, **client}) as made:
        try:
            with made.stream(messages, **options) as stream:
                asked.stream = stream
                asked.events.extend(stream)
            asked.final = stream.final()
        except KvrelayClientError as error:
            asked.error = error
    return asked


async def _ask_async(base_url: str, messages: Any, options: dict[str, Any], **client: Any) -> Asked:
    asked = Asked()
    async with AsyncClient(base_url, **{"retries": QUICK, **client}) as made:
        try:
            async with made.stream(messages, **options) as stream:
                asked.stream = stream
                async for event in stream:
                    asked.events.append(event)
            asked.final = await stream.final()
        except KvrelayClientError as error:
            asked.error = error
    return asked


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Callable[..., Asked]:
    """Asks a server through either client and reports how it went."""

    def run(
        server: FakeServer,
        messages: Any = "hello",
        *,
        client: dict[str, Any] | None = None,
        **options: Any,
    ) -> Asked:
        options = {"model": "fake", **options}
        if request.param == "sync":
            return _ask(server.base_url, messages, options, **(client or {}))
        return asyncio.run(_ask_async(server.base_url, messages, options, **(client or {})))

    return run


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a method of either client by name."""

    def run(server: FakeServer, method: str, *args: Any, client: Any = None, **kwargs: Any) -> Any:
        settings = {"retries": QUICK, **(client or {})}
        if request.param == "sync":
            with Client(server.base_url, **settings) as made:
                return getattr(made, method)(*args, **kwargs)

        async def inner() -> Any:
            async with AsyncClient(server.base_url, **settings) as made:
                return await getattr(made, method)(*args, **kwargs)

        return asyncio.run(inner())

    return run


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as made:
        yield made
