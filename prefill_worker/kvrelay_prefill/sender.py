"""Pushes one prompt's KV into a decode worker's lease: gather, seal, send, until it is released."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.sequence import SequenceSpec
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import DeadlineExceeded, KvrelayError, LeaseLost
from kvrelay_protocol.trace import TraceContext
from kvrelay_transfer.frames import HEADER_SIZE, FrameHeader, FrameKind, seal
from kvrelay_transfer.kit import TransferKit
from kvrelay_transfer.layout import DTYPE_CODES, KvLayout, Piece, WireFormat
from kvrelay_transfer.lease import (
    HandoverMessage,
    KvMessage,
    OpenLease,
    Outgoing,
    SendLease,
    SendState,
)
from kvrelay_transfer.ticket import frame_key
from kvrelay_transfer.timings import MessageNotes


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


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of one message, or of several and all their repeats."""

    gather_s: float
    send_s: float

    def __add__(self, other: "_Times") -> "_Times":
        return _Times(self.gather_s + other.gather_s, self.send_s + other.send_s)


@dataclass(frozen=True, slots=True)
class _Filled:
    frame: memoryview
    seconds: float


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
        self._key = b""
        self._blocks: tuple[int, ...] = ()
        self._output: FirstOutput | None = None
        self._trace: TraceContext | None = None
        self._changed = asyncio.Event()
        self._deadline = time.monotonic() + spec.deadline_s
        self._computed_at = 0.0
        self._send_s = 0.0
        self._bytes = 0
        self._messages = 0
        self._times: MessageNotes[_Times] = MessageNotes(_Times.__add__)
        self._reported = False
        self._failure: KvrelayError | None = None

    def admitted(self, blocks: tuple[int, ...], cached_blocks: int, trace: TraceContext) -> None:
        """The prompt has its blocks; the first ones hold valid KV, and so can be sent at once."""
        self._blocks = blocks
        self._trace = trace
        if cached_blocks:
            layout = self._kit.layout
            self.written(Piece(0, layout.num_layers, 0, cached_blocks * layout.block_size))

    def written(self, piece: Piece) -> None:
        """The engine has written the KV of these layers of these tokens, from a block's first one on."""
        self._lease.ready(piece)
        self._changed.set()

    def computed(self, output: FirstOutput) -> None:
        """The whole prompt is written and its first token sampled."""
        self._output = output
        self._computed_at = time.time()
        self._lease.computed()
        self._changed.set()

    def open(self, lease: OpenLease) -> None:
        """The decode worker granted its lease and has posted the first receive.

        One that this KV can't be sent to (its layout, its ticket) fails the prompt.
        """
        if self._lease.lease is not None:
            return
        spec, model = self._spec, self._kit.layout.model_fingerprint
        try:
            self._key = frame_key(
                lease.ticket, model=model, salt=spec.cache_salt, tokens=spec.tokens
            )
            self._lease.open(lease)
        except KvrelayError as error:
            self.fail(error)
            return
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
            LayoutMismatch: the granted blocks can't hold this KV.
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
            filled = await self._kit.copy(self._fill, staging.view, message, lease)
            begun = time.monotonic()
            await self._kit.transport.send(lease.address, lease.tag, filled.frame)
            seconds = time.monotonic() - begun
            self._send_s += seconds
            self._bytes += len(filled.frame)
            self._messages += 1
        if isinstance(message, KvMessage):
            self._times.add(message.number, _Times(filled.seconds, seconds))

    def _fill(self, buffer: memoryview, message: Outgoing, lease: OpenLease) -> _Filled:
        """Write one frame; runs on the copy thread."""
        begun = time.monotonic()
        match message:
            case KvMessage(number, piece):
                frame = self._fill_blocks(buffer, number, piece, lease)
            case HandoverMessage(total):
                frame = self._fill_record(buffer, total, lease)
        return _Filled(frame, time.monotonic() - begun)

    def _fill_blocks(
        self,
        buffer: memoryview,
        number: int,
        piece: Piece,
        lease: OpenLease,
    ) -> memoryview:
        wire = self._lease.wire
        assert wire is not None  # noqa: S101 - there is one for an open lease
        nbytes = wire.payload_bytes(piece)
        payload = buffer[HEADER_SIZE : HEADER_SIZE + nbytes]
        blocks_digest = self._gather(wire, lease.layout, piece, payload)
        header = FrameHeader(
            kind=FrameKind.KV_GROUP,
            lease_id=lease.identity.lease_id,
            epoch=lease.identity.epoch,
            generation=lease.identity.generation,
            sequence=number,
            layer_start=piece.layer_start,
            layer_count=piece.layer_count,
            token_start=piece.token_start,
            token_count=piece.token_count,
            head_start=wire.heads.start,
            head_count=len(wire.heads),
            block_tokens=wire.block_tokens,
            dtype_code=DTYPE_CODES[wire.dtype],
            trace=self._trace,
        )
        return seal(buffer, header, nbytes, self._key, blocks_digest)

    def _gather(
        self, wire: WireFormat, receiver: KvLayout, piece: Piece, out: memoryview
    ) -> bytes | None:
        layout, size, tokens = self._kit.layout, self._pool.block_size, piece.tokens
        if wire == WireFormat.between(layout, layout):
            end = -(-tokens.stop // size)
            return self._pool.gather(
                piece.layer_start,
                piece.layer_end,
                self._blocks[tokens.start // size : end],
                out,
                tokens.stop - (end - 1) * size,
            )
        return self._pool.gather_tokens(
            piece.layer_start,
            piece.layer_end,
            self._blocks,
            tokens,
            out,
            heads=wire.heads,
            dtype=getattr(torch, wire.dtype),
            digest=wire.heads == receiver.heads,
        )

    def _fill_record(self, buffer: memoryview, total: int, lease: OpenLease) -> memoryview:
        assert self._output is not None  # noqa: S101 - the record is due only after `computed`
        record = pb.Handover(
            first_token=self._output.token,
            first_token_index=self._spec.output_offset,
            prompt_tokens=len(self._spec.tokens),
            computed_at=self._computed_at,
            cached_tokens=self._output.cached_tokens,
            send_seconds=self._send_s,
            gather_seconds_each=[times.gather_s for times in self._times.in_order],
            send_seconds_each=[times.send_s for times in self._times.in_order],
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
        return seal(buffer, header, len(record), self._key)

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
