"""Reading another worker's weights, while this one still imports its libraries.

There is no event loop yet: the transport gets one on a thread of its own, and the threads that fetch
weights wait for it. Ranges go straight into the buffers that they are packed from.
"""

import asyncio
import atexit
import contextlib
import itertools
import secrets
import threading
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import (
    KvrelayError,
    PeerLost,
    TransferError,
    TransportMisconfigured,
    WeightsRefused,
)
from kvrelay_protocol.weights.stream import Received
from kvrelay_transfer.transport import KVTransport, Receive, complete_uri, create_transport
from kvrelay_transfer.weights.wire import (
    MAX_ANSWER_BYTES,
    MESSAGE_BYTES,
    Request,
    Verdict,
    unpack_answer,
    weights_key,
)

T = TypeVar("T")

REQUESTS = 8
"""Under way at once: the server sends one after the other, and the next ones wait there."""
_LOOK_S = 0.05
_START_S = 20.0
_CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Patience:
    """When a peer counts as too slow."""

    window_s: float = 3.0
    least_bytes: int = 75_000_000
    """In each window in which somebody waits. 25 MB/s is less than any store gives."""


UNHURRIED = Patience(window_s=60.0, least_bytes=1)
"""However slow, as long as something comes."""


class PeerReader:
    """A `PeerRanges`: made with a transport of its own, whose address the router is asked with; its answer
    goes to `read_from`, and then ranges can be fetched.
    """

    def __init__(
        self, uri: str, patience: Patience | None = None, *, message_bytes: int = MESSAGE_BYTES
    ) -> None:
        """Start a transport.

        Args:
            uri: of the transport that KV travels over, or its scheme.
            patience: with a slow peer.
            message_bytes: what bytes come in, at most `MESSAGE_BYTES`.

        Raises:
            TransportMisconfigured: the environment leaves no usable transport.
        """
        self._patience = patience or Patience()
        self._message_bytes = message_bytes
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="weights from peer", daemon=True)
        self._thread.start()
        self._closed = False
        self._numbers = itertools.count(1)
        self._slots = asyncio.Semaphore(REQUESTS)
        self._found = pb.WeightsFound()
        self._key = b""
        self._weights_id = ""
        self._gone = ""
        self._moved = 0
        self._waiting = 0
        """Ranges under way."""
        self._lanes = ""
        self._watching: asyncio.Task[None] | None = None
        try:
            self._transport = self._call(self._start(uri), _START_S)
        except TimeoutError:
            self._stop_loop()
            raise TransportMisconfigured(f"{uri} did not start in {_START_S:g} s") from None
        except BaseException:
            self._stop_loop()
            raise
        # A daemon's thread with native requests under way must not meet the interpreter's end.
        atexit.register(self.close)

    @property
    def address(self) -> bytes:
        """Where the bytes are to go: what the router is told."""
        return self._transport.address

    def read_from(self, found: pb.WeightsFound, weights_id: str) -> None:
        """Take the router's word for who has the weights.

        Raises:
            WeightsRefused: it came without a ticket.
        """
        self._key = weights_key(found.ticket)
        self._found, self._weights_id = found, weights_id
        self._call(self._begin_watch())

    # ---- PeerRanges

    @property
    def worker(self) -> str:
        return f"{self._found.worker_name} over {self._lanes or self._transport.chosen}"

    @property
    def gone(self) -> str:
        return self._gone

    def fetch(self, file: str, start: int, into: memoryview, received: Received) -> int:
        if self._gone or self._closed:
            return 0
        return self._call(self._fetch(file, start, into, received))

    def give_up(self, why: str) -> None:
        self._gone = self._gone or why

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        with contextlib.suppress(TimeoutError, KvrelayError):
            self._call(self._end(), _CLOSE_S)
        self._stop_loop()

    # ---- the loop's thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_S)

    def _call(self, work: Awaitable[T], seconds: float | None = None) -> T:
        async def run() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(seconds)

    @staticmethod
    async def _start(uri: str) -> KVTransport:
        transport = create_transport(complete_uri(uri))
        await transport.start()
        return transport

    async def _end(self) -> None:
        self.give_up("this start is over")
        for _ in range(REQUESTS):
            await self._slots.acquire()
        if self._watching is not None:
            await self._watching
        await self._transport.abort()

    async def _begin_watch(self) -> None:
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """Gives a peer up that is lost, or slow while somebody waits."""
        begun, moved = time.monotonic(), self._moved
        while not self._gone:
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            if not self._waiting:
                begun, moved = now, self._moved
            if self._transport.stats.peers_lost:
                self.give_up("the connection to it broke")
            elif now - begun > self._patience.window_s:
                if self._moved - moved < self._patience.least_bytes:
                    self.give_up(f"it sent {self._moved - moved} bytes in {now - begun:.1f} s")
                begun, moved = now, self._moved

    async def _fetch(self, file: str, start: int, into: memoryview, received: Received) -> int:
        async with self._slots:
            if self._gone:
                return 0
            self._waiting += 1
            try:
                return await self._fetch_range(file, start, into, received)
            finally:
                self._waiting -= 1

    async def _fetch_range(
        self, file: str, start: int, into: memoryview, received: Received
    ) -> int:
        answer_tag, data_tag = secrets.randbits(64), secrets.randbits(64)
        answer = bytearray(MAX_ANSWER_BYTES)
        size = self._message_bytes
        request = Request(
            next(self._numbers),
            file,
            start,
            len(into),
            answer_tag,
            data_tag,
            self._weights_id,
            size,
        )
        ends = [*range(size, len(into), size), len(into)]
        posted: list[Receive] = [self._transport.receive(answer_tag, answer)]
        done = 0
        try:
            begins = zip([0, *ends], ends, strict=False)
            posted += [self._transport.receive(data_tag, into[a:b]) for a, b in begins]
            await self._ask(request, posted[0], answer)
            for receive, end in zip(posted[1:], ends, strict=True):
                came = await self._unless_gone(receive)
                if came != end - done:
                    raise WeightsRefused(f"a message of {came} bytes, {end - done} were asked for")
                done = end
                self._moved += came
                received(came)
        except _NotHere:
            pass
        except TransferError as error:
            self.give_up(str(error))
        finally:
            for receive in posted:
                await receive.cancel()
            for tag in (answer_tag, data_tag):
                self._transport.end(tag)
        return done

    async def _ask(self, request: Request, answer: Receive, content: bytearray) -> None:
        """Raises TransferError: refused, or gone."""
        found = self._found
        await self._transport.send(found.transport_address, found.tag, request.pack(self._key))
        size = await self._unless_gone(answer)
        self._lanes = self._lanes or self._transport.transport_of(found.transport_address)
        verdict = unpack_answer(bytes(content[:size]), request.number, self._key)
        if verdict is Verdict.NOT_HERE:
            raise _NotHere
        if verdict is not Verdict.YES:
            raise WeightsRefused(f"worker {found.worker_name} refuses: {verdict.name.lower()}")

    async def _unless_gone(self, receive: Receive) -> int:
        """A message's bytes.

        Raises:
            TransferError: the peer was given up, or the message did not arrive.
        """
        waiting = asyncio.ensure_future(receive.wait())
        try:
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=_LOOK_S)
                if self._gone and not waiting.done():
                    raise PeerLost(self._gone)
            return waiting.result()
        finally:
            waiting.cancel()


class _NotHere(Exception):
    """The peer does not have these bytes; others it may have."""
