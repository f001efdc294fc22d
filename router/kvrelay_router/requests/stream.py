"""One request in flight as the HTTP edge sees it: an async iterator fed by the service."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from kvrelay_protocol.trace import TraceContext
from kvrelay_router.requests.types import Failed, Finished, RequestEvent, Tokens


class EventStream:
    """Implements `RequestStream`.

    The service appends and never waits; the reader takes. A slow reader's backlog is bounded by the
    request's `max_tokens`, and neighbouring `Tokens` are handed over as one.
    """

    def __init__(
        self,
        context: TraceContext,
        *,
        on_cancel: Callable[[str], None],
        on_stop: Callable[[], None],
    ) -> None:
        self.trace_id = context.trace_id.hex()
        self.traceparent = context.traceparent
        self._on_cancel = on_cancel
        self._on_stop = on_stop
        self._events: deque[RequestEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._take_tokens: Callable[[tuple[int, ...]], None] | None = None

    def __aiter__(self) -> AsyncIterator[RequestEvent]:
        return self

    async def __anext__(self) -> RequestEvent:
        if self._ended:
            raise StopAsyncIteration
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        event = self._take()
        self._ended = isinstance(event, Finished | Failed)
        return event

    def divert(self, take: Callable[[tuple[int, ...]], None]) -> None:
        self._take_tokens = take

    def stop_early(self) -> None:
        self._on_stop()

    def cancel(self, reason: str) -> None:
        self._on_cancel(reason)

    def put(self, event: RequestEvent) -> None:
        """For the service alone."""
        self._events.append(event)
        # One wake-up for all the events of a step: the reader runs after this loop iteration.
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def put_tokens(self, ids: tuple[int, ...]) -> None:
        """For the service alone: what comes for every token."""
        if self._take_tokens is not None and not self._events:
            self._take_tokens(ids)
        else:
            self.put(Tokens(ids))

    def _take(self) -> RequestEvent:
        event = self._events.popleft()
        if not isinstance(event, Tokens) or not self._events:
            return event
        ids = list(event.ids)
        while self._events and isinstance(self._events[0], Tokens):
            ids.extend(self._events[0].ids)
            self._events.popleft()
        return Tokens(tuple(ids)) if len(ids) > len(event.ids) else event
