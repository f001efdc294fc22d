"""Servers cancel a streaming handler when its client goes away, a plain one never: so watch."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.types import Receive


@contextlib.asynccontextmanager
async def watch_disconnect(receive: Receive, gone: Callable[[], None]) -> AsyncIterator[None]:
    """Call `gone` once if the client disconnects while the block runs. The body must be read."""

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
