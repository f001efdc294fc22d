"""Pushes one prompt's KV into a decode worker's lease: gather, seal, send, until it is released."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.sequence import SequenceSpec
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import DeadlineExceeded, KvrelayError, LeaseLost
from kvrelay_protocol.trace import TraceContext
from kvrelay_transfer.frames import HEADER_SIZE, FrameHeader, FrameKind, seal
from kvrelay_transfer.kit import TransferKit
from kvrelay_transfer.layout import Piece
from kvrelay_transfer.lease import (
    HandoverMessage,
    KvMessage,
    OpenLease,
    Outgoing,
    SendLease,
    SendState,
)


@dataclass(frozen=True, slots=True)
class FirstOutput:
    """What the decode worker must know to go on."""

    token: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Sent:
    """A whole transfer, as the sender saw it. Seconds of sending, summed over the messages."""

    bytes: int
    messages: int
    seconds: float
    transport: str


class KvSender:
    """One transfer. Its methods are called on the event loop; `run` is its task.

    Who holds what: the scheduler holds the prompt's blocks until `run` has ended (a gather may read
    them until then); a message holds one staging buffer from gather to the confirmed end of its send.
    """

    def __init__(
        self,
        spec: SequenceSpec,
        kit: TransferKit,
        pool: KVPool,
        *,
        lease_s: float,
        on_sent: Callable[[Sent], None],
    ) -> None:
        self._spec = spec
        self._kit = kit
        self._pool = pool
        self._lease_s = lease_s
        self._on_sent = on_sent
        self._lease = SendLease(kit.layout)
        self._blocks: tuple[int, ...] = ()
        self._output: FirstOutput | None = None
        self._trace: TraceContext | None = None
        self._changed = asyncio.Event()
        self._deadline = time.monotonic() + spec.deadline_s
        self._computed_at = 0.0
        self._send_s = 0.0
        self._bytes = 0
        self._messages = 0
        self._reported = False
        self._failure: KvrelayError | None = None

    def admitted(self, blocks: tuple[int, ...], cached_blocks: int, trace: TraceContext) -> None:
        """The prompt has its blocks; the first ones hold valid KV, and so can be sent at once."""
        self._blocks = blocks
        self._trace = trace
        if cached_blocks:
            self.written(Piece(0, self._kit.layout.num_layers, 0, cached_blocks))

    def written(self, piece: Piece) -> None:
        """The engine has written the KV of these layers of these logical blocks."""
        self._lease.ready(piece)
        self._changed.set()

    def computed(self, output: FirstOutput) -> None:
        """The whole prompt is written and its first token sampled."""
        self._output = output
        self._computed_at = time.time()
        self._lease.computed()
        self._changed.set()

    def open(self, lease: OpenLease) -> None:
        """The decode worker granted its lease and has posted the first receive."""
        self._lease.open(lease)
        self._kit.transport.connect(lease.address)
        self._changed.set()

    def resend(self, numbers: list[int]) -> None:
        self._lease.resend(numbers)
        self._changed.set()

    def release(self) -> None:
        """Nothing more is owed: the receiver has everything, or no transfer is wanted."""
        self._lease.release()
        self._changed.set()

    def fail(self, error: KvrelayError) -> None:
        """The prompt can't be computed: `run` raises this, once nothing is being sent."""
        self._failure = error
        self.release()

    async def run(self) -> None:
        """Send what is ready, as it becomes ready, until released.

        Raises:
            KvrelayError: what `fail` was given.
            PeerLost, TransferCancelled: the decode worker is gone or gave up.
            LeaseLost: everything was sent, and no release came within the lease time.
            DeadlineExceeded: the request's time is over, whatever this was waiting for.
        """
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                await self._send_until_released()
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed during its prefill") from None

    async def _send_until_released(self) -> None:
        while self._lease.state is not SendState.RELEASED:
            message = self._lease.next()
            if message is not None:
                await self._send(message)
                continue
            self._lease.idle()
            if self._lease.state is SendState.SENT:
                self._report()
            await self._wait()
        if self._failure is not None:
            raise self._failure

    async def _wait(self) -> None:
        limit = self._lease_s if self._lease.state is SendState.SENT else None
        try:
            async with asyncio.timeout(limit):
                await self._changed.wait()
        except TimeoutError:
            raise LeaseLost(f"no release within {self._lease_s:g} s of the last block") from None
        self._changed.clear()

    async def _send(self, message: Outgoing) -> None:
        lease = self._lease.lease
        assert lease is not None  # noqa: S101 - `next` gives messages of open leases only
        with await self._kit.staging.acquire() as staging:
            frame = await self._kit.copy(self._fill, staging.view, message, lease)
            begun = time.monotonic()
            await self._kit.transport.send(lease.address, lease.tag, frame)
            self._send_s += time.monotonic() - begun
            self._bytes += len(frame)
            self._messages += 1

    def _fill(self, buffer: memoryview, message: Outgoing, lease: OpenLease) -> memoryview:
        """Write one frame; runs on the copy thread."""
        match message:
            case KvMessage(number, piece):
                return self._fill_blocks(buffer, number, piece, lease)
            case HandoverMessage(total):
                return self._fill_record(buffer, total, lease)

    def _fill_blocks(
        self,
        buffer: memoryview,
        number: int,
        piece: Piece,
        lease: OpenLease,
    ) -> memoryview:
        end_layer = piece.layer_start + piece.layer_count
        end_block = piece.block_first + piece.block_count
        nbytes = piece.payload_bytes(self._kit.layout)
        tokens = min(len(self._spec.tokens), end_block * self._pool.block_size)
        blocks_digest = self._pool.gather(
            piece.layer_start,
            end_layer,
            self._blocks[piece.block_first : end_block],
            buffer[HEADER_SIZE : HEADER_SIZE + nbytes],
            tokens - (end_block - 1) * self._pool.block_size,
        )
        header = FrameHeader(
            kind=FrameKind.KV_GROUP,
            lease_id=lease.identity.lease_id,
            epoch=lease.identity.epoch,
            generation=lease.identity.generation,
            sequence=number,
            layer_start=piece.layer_start,
            layer_count=piece.layer_count,
            block_first=piece.block_first,
            block_count=piece.block_count,
            trace=self._trace,
        )
        return seal(buffer, header, nbytes, blocks_digest)

    def _fill_record(self, buffer: memoryview, total: int, lease: OpenLease) -> memoryview:
        assert self._output is not None  # noqa: S101 - the record is due only after `computed`
        record = pb.Handover(
            first_token=self._output.token,
            first_token_index=self._spec.output_offset,
            prompt_tokens=len(self._spec.tokens),
            computed_at=self._computed_at,
            cached_tokens=self._output.cached_tokens,
            send_seconds=self._send_s,
            transport=self._kit.transport.transport_of(lease.address),
        ).SerializeToString()
        buffer[HEADER_SIZE : HEADER_SIZE + len(record)] = record
        header = FrameHeader(
            kind=FrameKind.HANDOVER,
            lease_id=lease.identity.lease_id,
            epoch=lease.identity.epoch,
            generation=lease.identity.generation,
            sequence=total,
            total_messages=total + 1,
            trace=self._trace,
        )
        return seal(buffer, header, len(record))

    def _report(self) -> None:
        if self._reported or self._lease.lease is None:
            return
        self._reported = True
        self._on_sent(
            Sent(
                bytes=self._bytes,
                messages=self._messages,
                seconds=self._send_s,
                transport=self._kit.transport.transport_of(self._lease.lease.address),
            ),
        )
