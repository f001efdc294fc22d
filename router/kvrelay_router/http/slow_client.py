"""Cutting off clients that take no bytes. One timer per response, none per message."""

import asyncio
from types import TracebackType
from typing import Self

from starlette.types import Message, Send


class SendGuard:
    """Inside the block a `send` that hangs for longer than the limit raises `TimeoutError`."""

    def __init__(self, send: Send, limit_s: float) -> None:
        self._send = send
        self._limit_s = limit_s
        self._began: float | None = None
        """When the send in progress began."""
        self._expired = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._arm()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()

    async def send(self, message: Message) -> None:
        """Send one message."""
        self._began = self._loop.time()
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if self._expired and self._task is not None and self._task.uncancel() == 0:
                raise TimeoutError from None
            raise
        finally:
            self._began = None

    def _arm(self) -> None:
        self._timer = self._loop.call_later(self._limit_s / 4, self._check)

    def _check(self) -> None:
        if self._began is None or self._loop.time() - self._began < self._limit_s:
            self._arm()
        elif self._task is not None:
            self._expired = True
            self._task.cancel()
