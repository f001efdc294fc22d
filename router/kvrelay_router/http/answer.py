"""Writes a generation to the client, streaming or whole, and cancels it when the client is gone.

The work happens inside the response, not in the handler: the watch for a lost client then covers
all of it, from before the first token to the last byte.
"""

import asyncio
from dataclasses import dataclass
from functools import partial
from time import monotonic

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from kvrelay_protocol.errors import KvrelayError
from kvrelay_router.http import sse
from kvrelay_router.http.direct import DirectClient, direct_client
from kvrelay_router.http.disconnect import watch_disconnect
from kvrelay_router.http.errors import error_object, internal_error, log_defect
from kvrelay_router.http.frames import Frames
from kvrelay_router.http.generation import Delta, End, Generation, Notice, Output
from kvrelay_router.http.request_id import request_id_of
from kvrelay_router.http.slow_client import SendGuard
from kvrelay_router.requests.types import Path, PathKind


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the edge waits for what."""

    head_s: float = 5.0
    """For a place, before a stream's head goes out without one."""
    sdk_head_s: float = 0.5
    """The same for SDK streams, which show the queue."""
    ping_s: float = 10.0
    """Silence before a sign of life."""
    send_s: float = 30.0
    """For a client that takes no bytes."""


class Answer:
    """One request of a generating endpoint, from its submission to its last byte: an ASGI app."""

    def __init__(
        self,
        generation: Generation,
        frames: Frames,
        patience: Patience,
        *,
        named_events: bool,
    ) -> None:
        """Args: `named_events` speaks the SDK's stream protocol."""
        self._generation = generation
        self._frames = frames
        self._patience = patience
        self._named = named_events
        self._continuous_usage = generation.plan.continuous_usage
        self._opened: set[int] = set()
        self._client: DirectClient | None = None
        self._wrote_at = 0.0
        self._sending = False
        """The writer holds text that must leave before any other."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises: KvrelayError, as long as the head is not out."""
        generation = self._generation
        self._client = direct_client(scope)
        try:
            async with (
                watch_disconnect(self._client, receive, generation.client_gone),
                SendGuard(send, self._patience.send_s) as guard,
            ):
                generation.start()
                # What the workers wait for leaves before what the client can't use yet.
                await asyncio.sleep(0)
                if generation.plan.stream:
                    await self._stream(scope, guard.send)
                else:
                    await self._whole(scope, receive, guard.send)
        except TimeoutError:
            # The client reads nothing. The engine never waited; now the buffers go too.
            await generation.close("client too slow")
            if self._client is not None:
                self._client.abort()
        finally:
            await generation.close()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        texts = [""] * len(generation.choices)
        generation.sink = partial(_collect, texts)
        await generation.ended()
        for output in await generation.outputs():
            if isinstance(output, Delta):
                texts[output.index] += output.text
        if generation.gone:
            return
        if generation.error is not None:
            raise generation.error
        reasons = [str(choice.reason) for choice in generation.choices]
        body = self._frames.whole(list(zip(texts, reasons, strict=True)), generation.usage())
        if (timings := generation.timings()) is not None:
            body["kvrelay"] = timings
        await JSONResponse(body, headers=self._own_headers())(scope, receive, send)

    async def _stream(self, scope: Scope, send: Send) -> None:
        generation = self._generation
        wait = self._patience.sdk_head_s if self._named else self._patience.head_s
        await generation.placed(wait)
        if generation.gone:
            return
        if generation.error is not None:
            raise generation.error  # the head is not out yet: the real status
        headers = {**sse.HEADERS, **self._own_headers()}
        await send({
            "type": "http.response.start",
            "status": 200,
            "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()],
        })  # fmt: skip
        self._wrote_at = monotonic()
        try:
            await self._events(scope, send)
        except TimeoutError:
            raise
        except Exception as error:
            request_id = request_id_of(scope)
            log_defect(error, request_id)
            await self._body(send, _error_frame(internal_error(request_id), request_id), more=False)

    async def _events(self, scope: Scope, send: Send) -> None:
        generation = self._generation
        if self._client is not None:
            generation.sink = self._write
        while not generation.over:
            outputs = await generation.outputs(self._time_to_ping())
            if outputs:
                await self._body(send, self._render(outputs))
            elif not generation.over and not self._time_to_ping():
                await self._body(send, self._ping())
        rest = self._render(await generation.outputs())
        if generation.gone:
            return
        if generation.error is not None:
            request_id = request_id_of(scope)
            await self._body(send, rest + _error_frame(generation.error, request_id), more=False)
            return
        if generation.plan.include_usage:
            rest += self._frames.usage(generation.usage())
        if self._named and (timings := generation.timings()) is not None:
            rest += sse.named_frame("timings", timings)
        await self._body(send, rest + sse.DONE, more=False)

    def _write(self, index: int, text: str) -> bool:
        """The path of every token: straight to the socket."""
        client = self._client
        if client is None or self._sending or client.behind:
            return False
        self._wrote_at = monotonic()
        client.write(self._delta(index, text))
        return True

    def _render(self, outputs: list[Output]) -> bytes:
        return b"".join(map(self._frame, outputs))

    def _frame(self, output: Output) -> bytes:
        match output:
            case Delta(index, text):
                return self._delta(index, text)
            case End(index, reason):
                return self._opening(index) + self._frames.finish(index, reason)
            case Notice(event, data):
                return sse.named_frame(event, data)

    def _delta(self, index: int, text: str) -> bytes:
        usage = self._generation.usage() if self._continuous_usage else None
        frame = self._frames.delta(index, text, usage)
        return frame if index in self._opened else self._opening(index) + frame

    def _opening(self, index: int) -> bytes:
        if index in self._opened:
            return b""
        # With the first text, not before: naive clients take the first chunk as the first token.
        self._opened.add(index)
        return self._frames.opening(index)

    def _time_to_ping(self) -> float:
        """Seconds until the client has had nothing for too long."""
        return max(0.0, self._wrote_at + self._patience.ping_s - monotonic())

    def _ping(self) -> bytes:
        return sse.PING_EVENT if self._named else sse.PING_COMMENT

    def _own_headers(self) -> dict[str, str]:
        generation = self._generation
        return {
            "x-trace-id": generation.trace_id,
            "x-kvrelay-path": _path_header(generation.path),
            **generation.plan.headers,
        }

    async def _body(self, send: Send, body: bytes, *, more: bool = True) -> None:
        if self._client is not None:
            self._client.flush()
        if not body and more:
            return
        self._wrote_at = monotonic()
        self._sending = True
        try:
            await send({"type": "http.response.body", "body": body, "more_body": more})
        finally:
            self._sending = False


def _collect(texts: list[str], index: int, text: str) -> bool:
    texts[index] += text
    return True


def _path_header(path: Path | None) -> str:
    if path is None:
        return "pending"
    return (
        path.kind if path.kind is PathKind.DISAGGREGATED else f"{path.kind}; reason={path.reason}"
    )


def _error_frame(error: KvrelayError, request_id: str) -> bytes:
    """The last frame of a stream that fails after its head, with `[DONE]`."""
    body = error_object(error)
    if request_id not in error.message:
        # Clients can't read headers any more at this point, so the id goes into the text.
        body["error"]["message"] += f" (request id {request_id})"
    return sse.data_frame(body) + sse.DONE
