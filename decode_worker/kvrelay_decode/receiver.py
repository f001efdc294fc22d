"""Takes one prompt's KV into reserved blocks: receive, verify, scatter, until nothing is missing."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvrelay_engine.cache.pool import KVPool
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import CorruptFrame, DeadlineExceeded, LeaseLost, StaleFrame
from kvrelay_protocol.trace import TraceContext
from kvrelay_transfer.frames import Expected, Frame, FrameKind, open_frame
from kvrelay_transfer.kit import TransferKit, to_the_end
from kvrelay_transfer.layout import Piece
from kvrelay_transfer.lease import (
    Abandon,
    Complete,
    Continue,
    LeaseId,
    Missing,
    ReceiveLease,
    Verdict,
)
from kvrelay_transfer.transport import Receive, Truncated

QUIET_S = 0.25
"""After a corrupt frame: silence that means the hand-over record itself may have been lost."""


@dataclass(frozen=True, slots=True)
class Received:
    """A whole transfer, as the receiver saw it."""

    handover: pb.Handover
    prefill_trace: TraceContext | None
    bytes: int
    messages: int
    seconds: float
    """Sending, summed over the messages; what was computed between them does not count."""
    exposed_seconds: float
    """From the computed prompt to here: transfer the prefill did not hide. Two hosts' clocks."""
    first_ns: int
    """Wall clock of the first message, nanoseconds since the epoch."""


class KvReceiver:
    """One transfer. `run` is its task; when it has ended, nothing writes to its blocks any more.

    A granted lease always has a receive posted, so a sender never holds its staging buffers for a
    lease that can't take them: the two pools of staging buffers can't deadlock.
    """

    def __init__(
        self,
        identity: LeaseId,
        *,
        tag: int,
        prompt_blocks: tuple[int, ...],
        first_block: int,
        kit: TransferKit,
        pool: KVPool,
        lease_s: float,
        deadline: float,
        on_posted: Callable[[], None],
        on_missing: Callable[[tuple[int, ...]], None],
    ) -> None:
        owed = pool.num_layers * (len(prompt_blocks) - first_block)
        self.lease = ReceiveLease(identity, owed)
        self._tag = tag
        self._blocks = prompt_blocks
        self._first_block = first_block
        self._kit = kit
        self._pool = pool
        self._lease_s = lease_s
        self._deadline = deadline
        self._on_posted = on_posted
        self._on_missing = on_missing
        self._bytes = 0
        self._messages = 0
        self._first: float | None = None
        self._first_ns = 0

    async def run(self) -> Received:
        """Receive until complete.

        Raises:
            CorruptFrame: frames were still missing after the resends.
            LeaseLost: no progress within the lease time.
            DeadlineExceeded: the request's time is over, whatever this was waiting for.
            PeerLost: the sender died in the middle of a message.
        """
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                return await self._receive_all()
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed during its transfer") from None

    async def _receive_all(self) -> Received:
        with await self._kit.staging.acquire() as staging:
            receive = self._kit.transport.receive(self._tag, staging.view)
            try:
                self.lease.posted()
                self._on_posted()
                while True:
                    done = await self._turn(receive, staging.view)
                    if done is not None:
                        return done
                    if receive.done:
                        receive = self._kit.transport.receive(self._tag, staging.view)
            finally:
                # Confirmed before the staging buffer goes back and the caller frees the blocks.
                await to_the_end(receive.cancel())
                self._kit.transport.end(self._tag)

    async def _turn(self, receive: Receive, buffer: memoryview) -> Received | None:
        frame: Frame | None = None
        damage: Exception | None = None
        try:
            nbytes = await self._next_message(receive)
            if nbytes is not None:
                frame = await self._kit.copy(self._take, buffer, nbytes)
        except (CorruptFrame, StaleFrame, Truncated) as error:
            damage = error
        if damage is not None:
            self._obey(self.lease.corrupt(), damage)
            return None
        if nbytes is None or frame is None:
            self._obey(self.lease.quiet())
            return None
        self._count(nbytes)
        if frame.header.kind is FrameKind.KV_GROUP:
            size = frame.header.layer_count * frame.header.block_count
            self.lease.kv_message(frame.header.sequence, size)
            return None
        verdict = self.lease.handover(frame.header.total_messages - 1)
        self._obey(verdict)
        if not isinstance(verdict, Complete):
            return None
        return self._finished(pb.Handover.FromString(bytes(frame.payload)), frame)

    async def _next_message(self, receive: Receive) -> int | None:
        """Length of the next message; None when it is quiet and the record is in doubt."""
        # Before the first message the lease is kept by the router's stream, which ends it when the
        # prefill worker is lost: a prompt may wait in a prefill queue longer than a lease.
        limit = None if self._first is None else self._lease_s
        if self.lease.record_in_doubt:
            limit = min(QUIET_S, self._lease_s)
        try:
            async with asyncio.timeout(limit):
                return await receive.wait()
        except TimeoutError:
            if self.lease.record_in_doubt:
                return None
            self.lease.expire()
            raise LeaseLost(f"no KV block came for {self._lease_s:g} s") from None

    def _take(self, buffer: memoryview, nbytes: int) -> Frame:
        """Verify a frame and write its blocks to the pool; runs on the copy thread."""
        identity = self.lease.identity
        expected = Expected(identity.lease_id, identity.epoch, identity.generation)
        frame = open_frame(buffer, nbytes, expected)
        if frame.header.kind is FrameKind.KV_GROUP:
            self._write(frame)
        return frame

    def _write(self, frame: Frame) -> None:
        header = frame.header
        piece = Piece(
            header.layer_start, header.layer_count, header.block_first, header.block_count
        )
        end_layer = piece.layer_start + piece.layer_count
        end_block = piece.block_first + piece.block_count
        inside = end_layer <= self._pool.num_layers and end_block <= len(self._blocks)
        whole = 0 < len(frame.payload) == piece.payload_bytes(self._kit.layout)
        if not inside or not whole or piece.block_first < self._first_block:
            raise StaleFrame(
                f"a frame of {len(frame.payload)} bytes for layers up to {end_layer} and blocks "
                f"{piece.block_first} to {end_block}; the lease has {self._pool.num_layers} layers "
                f"and blocks {self._first_block} to {len(self._blocks)}",
            )
        if self.lease.has(header.sequence):
            return
        copied = self._pool.scatter(
            piece.layer_start,
            end_layer,
            self._blocks[piece.block_first : end_block],
            frame.payload,
            digest=frame.blocks_digest is not None,
        )
        # Too late to keep damage out of the blocks, in time to keep it from counting as received: the
        # lease's blocks have no reader before all of them do.
        if copied != frame.blocks_digest:
            raise CorruptFrame(
                f"the digest of {len(frame.payload)} bytes of KV blocks does not hold"
            )

    def _count(self, nbytes: int) -> None:
        if self._first is None:
            self._first = time.monotonic()
            self._first_ns = time.time_ns()
        self._bytes += nbytes
        self._messages += 1

    def _obey(self, verdict: Verdict, cause: Exception | None = None) -> None:
        match verdict:
            case Missing(numbers):
                self._on_missing(numbers)
            case Abandon(reason):
                raise CorruptFrame(f"transfer given up: {reason}") from cause
            case Continue() | Complete():
                pass

    def _finished(self, handover: pb.Handover, frame: Frame) -> Received:
        assert self._first is not None  # noqa: S101 - the record itself was counted
        return Received(
            handover=handover,
            prefill_trace=frame.header.trace,
            bytes=self._bytes,
            messages=self._messages,
            seconds=handover.send_seconds,
            exposed_seconds=max(0.0, time.time() - handover.computed_at),
            first_ns=self._first_ns,
        )
