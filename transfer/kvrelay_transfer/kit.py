"""What one worker process has for moving KV, made once at start-up and shared by its transfers."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.staging import StagingBuffers
from kvrelay_transfer.transport import KVTransport

P = ParamSpec("P")
T = TypeVar("T")


def _copy_thread() -> ThreadPoolExecutor:
    # One thread: copies are bound by memory bandwidth, and more would take the engine's cores.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-copy")


async def to_the_end(work: Awaitable[T]) -> T:
    """Await `work`; cancelling the caller, however often, takes effect only once `work` has ended."""
    future = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return future.result()
    if not future.cancelled():
        future.exception()  # the cancel hides it; it is not left behind as unnoticed
    raise cancelled


@dataclass(frozen=True, slots=True)
class TransferKit:
    """Transport, staging buffers and the thread that copies between them and the KV pool."""

    transport: KVTransport
    staging: StagingBuffers
    layout: KvLayout
    copies: ThreadPoolExecutor = field(default_factory=_copy_thread)

    async def copy(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` on the copy thread. A cancel is delivered only once the copy has ended, so the
        caller may give its buffers and blocks back as soon as this returns or raises.
        """
        run = asyncio.get_running_loop().run_in_executor
        return await to_the_end(run(self.copies, lambda: work(*args, **kwargs)))

    async def close(self) -> None:
        await self.transport.close()
        self.copies.shutdown(wait=True)
