"""Servers cancel a streaming handler when its client goes away, a plain one never: so watch."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.types import Receive

from kvrelay_router.http.direct import DirectClient


@contextlib.asynccontextmanager
async def watch_disconnect(
    client: DirectClient | None, receive: Receive, gone: Callable[[], None]
) -> AsyncIterator[None]:
    """Call `gone` once if the client disconnects while the block runs. The body must be read.

    Args:
        client: tells by itself where the server is ours; elsewhere a task listens to `receive`.
    """
    if client is not None:
        client.watch(gone)
        try:
            yield
        finally:
            client.watch(None)
        return

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
