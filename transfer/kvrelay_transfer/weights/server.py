"""A worker's weights for those that start: one range at a time, behind everything else it does.

```
offer(): WAITING ──first request──► SERVING ──IDLE_S without one──► over
            └── offer's seconds ──► EXPIRED ──REFUSE_S──► over
```

The router names reader, weights and ticket (`OfferWeights`); nothing that comes over the transport is
believed before, and bytes go to the offer's address alone. An offer has a tag of its own: what comes with
another one is not received.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import TransferCancelled, TransferError
from kvrelay_transfer.kit import to_the_end
from kvrelay_transfer.transport import KVTransport, Receive, Truncated
from kvrelay_transfer.weights.wire import (
    MAX_REQUEST_BYTES,
    MESSAGE_BYTES,
    OpenedRequest,
    Verdict,
    answer_tag_of,
    identity_digest,
    pack_answer,
    weights_key,
)

log = logging.getLogger(__name__)

MAX_OFFERS = 16
IDLE_S = 30.0
REFUSE_S = 30.0
"""How long a late reader is told that it is late."""
SEND_S = 10.0
"""For one message; a reader that takes longer is let go."""
BUSY_SHARE = 0.25
"""Of the time that may go into sending weights while the worker has requests."""
_NICENESS = 10


class ReadableWeights(Protocol):
    """The bytes of a checkpoint's files, as far as a worker still has them."""

    @property
    def identity(self) -> str:
        """Of exactly these bytes; empty: none are to be had."""

    def has(self, file: str, start: int, end: int) -> bool: ...

    def read(self, file: str, start: int, into: memoryview) -> None:
        """Fill `into`, of bytes that are there. Called on one thread, beside the engine's."""


@dataclass(slots=True)
class _Offer:
    message: pb.OfferWeights
    key: bytes
    last_number: int = 0
    sent: int = 0
    begun: float = field(default_factory=time.monotonic)


class WeightServer:
    """See the module. Owned by the transport's loop."""

    def __init__(
        self, transport: KVTransport, weights: ReadableWeights, *, busy: Callable[[], bool]
    ) -> None:
        """Args:
        transport: what KV travels over; not closed here.
        weights: what there is to read.
        busy: whether requests are waiting for this worker at the moment.
        """
        self._transport = transport
        self._weights = weights
        self._busy = busy
        self._offers: dict[int, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()
        """Held while one range is sent; first come first served."""
        self._buffers: tuple[memoryview, ...] = ()
        self._reader = ThreadPoolExecutor(1, "weights-read", initializer=_be_nice)
        self.refused: dict[Verdict, int] = {}
        """How often what was asked for was not given, by reason."""

    def offer(self, message: pb.OfferWeights) -> None:
        """The router lets somebody read. Never waits."""
        if len(self._offers) >= MAX_OFFERS or message.tag in self._offers:
            log.warning("no more readers of weights than %d: %s waits in vain", MAX_OFFERS,
                        message.worker_name)  # fmt: skip
            return
        try:
            offer = _Offer(message, weights_key(message.ticket))
        except TransferError as error:
            log.warning("an offer of weights for %s is void: %s", message.worker_name, error)
            return
        task = asyncio.get_running_loop().create_task(self._serve(offer))
        self._offers[message.tag] = task
        task.add_done_callback(lambda _: self._offers.pop(message.tag, None))

    async def close(self) -> None:
        """Stop sending; when this returns nothing reads the weights any more."""
        tasks = list(self._offers.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._reader.shutdown)

    async def _serve(self, offer: _Offer) -> None:
        buffer = bytearray(MAX_REQUEST_BYTES)
        tag, name = offer.message.tag, offer.message.worker_name
        expires = offer.begun + offer.message.seconds
        try:
            while True:
                over = expires + REFUSE_S if not offer.last_number else time.monotonic() + IDLE_S
                try:
                    size = await self._within(over, self._transport.receive(tag, buffer))
                except Truncated:
                    await self._refuse(offer, Verdict.MALFORMED, None, 0)
                    continue
                if size is None:
                    return
                await self._handle(offer, bytes(buffer[:size]), expires)
        except (TransferError, TimeoutError) as error:
            log.warning("worker %s reads no more weights: %s", name, str(error) or "it is stuck")
        except Exception:
            log.exception("sending weights to worker %s failed", name)
        finally:
            self._transport.end(tag)
            if offer.sent:
                log.info("worker %s took %d bytes of weights", name, offer.sent)

    @staticmethod
    async def _within(moment: float, receive: Receive) -> int | None:
        """A message's bytes, None where none came until `moment`."""
        try:
            async with asyncio.timeout(max(moment - time.monotonic(), 0.0)):
                return await receive.wait()
        except TimeoutError:
            return None
        finally:
            await receive.cancel()

    async def _handle(self, offer: _Offer, content: bytes, expires: float) -> None:
        request = OpenedRequest.unpack(content, offer.key)
        if isinstance(request, Verdict):
            await self._refuse(offer, request, answer_tag_of(content), 0)
            return
        verdict = self._judge(offer, request, expires)
        if verdict is not Verdict.YES:
            await self._refuse(offer, verdict, request.answer_tag, request.number)
            return
        offer.last_number = request.number
        async with self._turn:
            await self._send(offer, request)

    def _judge(self, offer: _Offer, request: OpenedRequest, expires: float) -> Verdict:
        ours = self._weights.identity
        named = identity_digest(ours) == request.identity
        if not ours or ours != offer.message.weights_id or not named:
            return Verdict.OTHER_WEIGHTS
        if not offer.last_number and time.monotonic() > expires:
            return Verdict.EXPIRED
        if request.number <= offer.last_number:
            return Verdict.REPEATED
        if not self._weights.has(request.file, request.start, request.start + request.nbytes):
            return Verdict.NOT_HERE
        return Verdict.YES

    async def _refuse(
        self, offer: _Offer, verdict: Verdict, answer_tag: int | None, number: int
    ) -> None:
        self.refused[verdict] = self.refused.get(verdict, 0) + 1
        log.warning(
            "a request for weights in the name of worker %s is refused: %s",
            offer.message.worker_name,
            verdict.name.lower(),
        )
        if answer_tag is not None:
            await self._say(offer, answer_tag, pack_answer(number, verdict, offer.key))

    async def _say(self, offer: _Offer, tag: int, content: bytes | memoryview) -> None:
        """Raises TransferError, TimeoutError."""
        async with asyncio.timeout(SEND_S):
            await self._transport.send(offer.message.transport_address, tag, content)

    # ---- one range

    async def _send(self, offer: _Offer, request: OpenedRequest) -> None:
        answer = pack_answer(request.number, Verdict.YES, offer.key)
        await self._say(offer, request.answer_tag, answer)
        filling = self._fill(request, 0)
        try:
            for index in range(-(-request.nbytes // request.message_bytes)):
                view = await filling
                if (index + 1) * request.message_bytes < request.nbytes:
                    # Into the other buffer: what it held has left it.
                    filling = self._fill(request, index + 1)
                await self._send_message(offer, request.data_tag, view)
        except TransferCancelled:
            return  # its reader does not want the rest of this range
        finally:
            with contextlib.suppress(Exception):
                await to_the_end(filling)  # nothing writes to the buffers any more

    async def _send_message(self, offer: _Offer, tag: int, view: memoryview) -> None:
        begun = time.monotonic()
        await self._say(offer, tag, view)
        offer.sent += len(view)
        if self._busy():
            await asyncio.sleep(pause_s(time.monotonic() - begun))

    def _fill(self, request: OpenedRequest, index: int) -> "asyncio.Future[memoryview]":
        """Bytes of message `index` of a range, in the buffer whose turn it is."""
        at = index * request.message_bytes
        if not self._buffers:
            self._buffers = tuple(memoryview(bytearray(MESSAGE_BYTES)) for _ in range(2))
        view = self._buffers[index % 2][: min(request.message_bytes, request.nbytes - at)]

        def read() -> memoryview:
            self._weights.read(request.file, request.start + at, view)
            return view

        return asyncio.get_running_loop().run_in_executor(self._reader, read)


def serve_weights(
    transport: KVTransport, weights: ReadableWeights | None, busy: Callable[[], bool]
) -> WeightServer | None:
    """A server where there is something to serve."""
    return WeightServer(transport, weights, busy=busy) if weights and weights.identity else None


def pause_s(sending_s: float) -> float:
    """How long a busy worker rests after sending for `sending_s`."""
    return sending_s * (1 / BUSY_SHARE - 1)


def _be_nice() -> None:
    """This thread gets what the engine's leave over."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
