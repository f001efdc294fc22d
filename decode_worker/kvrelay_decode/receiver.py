"""Takes one prompt's KV into reserved blocks: receive, verify, scatter, until nothing is missing."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvrelay_decode.message_events import Arrived, MessageEvent, arrival_of, merge, message_events
from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.sequence import SequenceSpec
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import CorruptFrame, DeadlineExceeded, LeaseLost, StaleFrame
from kvrelay_protocol.trace import TraceContext
from kvrelay_transfer.frames import Expected, Frame, FrameHeader, FrameKind, open_frame
from kvrelay_transfer.kit import TransferKit, to_the_end
from kvrelay_transfer.layout import DTYPE_CODES, Piece, WireFormat
from kvrelay_transfer.lease import (
    Abandon,
    Complete,
    Continue,
    LeaseId,
    Missing,
    ReceiveLease,
    Verdict,
)
from kvrelay_transfer.ticket import frame_key
from kvrelay_transfer.timings import MessageNotes
from kvrelay_transfer.transport import Receive, Truncated

QUIET_S = 0.25
"""After a refused frame: silence that means the hand-over record itself may have been lost."""


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
    events: list[MessageEvent]
    """For the trace."""


@dataclass(frozen=True, slots=True)
class _Taken:
    frame: Frame
    seconds: float


class KvReceiver:
    """One transfer. `run` is its task; when it has ended, nothing writes to its blocks any more.

    Its lease lives as long as something happens: before the first message for `lease_s` from the grant or
    from the last `renew` (a prompt may wait in a prefill queue longer than that), then for `lease_s` from the
    last message, whatever the router says.

    A granted lease always has a receive posted, so a sender never holds its staging buffers for a
    lease that can't take them: the two pools of staging buffers can't deadlock.
    """

    def __init__(
        self,
        identity: LeaseId,
        *,
        ticket: bytes,
        tag: int,
        spec: SequenceSpec,
        prompt_blocks: tuple[int, ...],
        first_block: int,
        kit: TransferKit,
        pool: KVPool,
        lease_s: float,
        deadline: float,
        on_posted: Callable[[], None],
        on_missing: Callable[[tuple[int, ...]], None],
        heads: range | None = None,
    ) -> None:
        """Make a receiver; nothing is posted before `run`.

        Args:
            identity: what every frame must name.
            ticket: of the lease, 32 bytes.
            tag: of the transport, random.
            spec: the prompt whose KV is expected, and its tenant.
            prompt_blocks: physical blocks of the whole prompt.
            first_block: logical blocks before this one hold valid KV already.
            kit: transport and buffers.
            pool: what the blocks belong to.
            lease_s: seconds without a sign of life that end the lease.
            deadline: of the request, on the monotonic clock.
            on_posted: the lease can be granted.
            on_missing: these messages are to be sent again.
            heads: those that this sender has, out of the pool's; None: all of the pool's.
        """
        self._first_token = first_block * pool.block_size
        self._prompt_tokens = len(spec.tokens)
        owed = pool.num_layers * (self._prompt_tokens - self._first_token)
        self.lease = ReceiveLease(identity, owed)
        model = kit.layout.model_fingerprint
        key = frame_key(ticket, model=model, salt=spec.cache_salt, tokens=spec.tokens)
        self._expected = Expected(identity.lease_id, identity.epoch, identity.generation, key)
        self._tag = tag
        self._blocks = prompt_blocks
        self._heads = pool.heads if heads is None else heads
        self._kit = kit
        self._pool = pool
        self._lease_s = lease_s
        self._deadline = deadline
        self._on_posted = on_posted
        self._on_missing = on_missing
        self._renewed = False
        self._waiting: asyncio.Timeout | None = None
        self._heard = False
        self._refused: CorruptFrame | StaleFrame | Truncated | None = None
        self._bytes = 0
        self._messages = 0
        self._first_ns = 0
        self._notes: MessageNotes[Arrived] = MessageNotes(merge)

    def renew(self) -> None:
        """The router still counts on this lease. Of no effect once a message came.

        A router that never renews keeps its leases by its Join stream alone: the time begins to count with
        the first call.
        """
        self._renewed = True
        if not self._heard and not self.lease.record_in_doubt:
            self._wait_for(self._lease_s)

    def all_sent(self) -> None:
        """The sender has sent everything: what is not here soon has to be asked for."""
        self.lease.all_sent()
        if self.lease.record_in_doubt:
            self._wait_for(self._patience_s)

    @property
    def _patience_s(self) -> float:
        """Of a receiver that doubts whether more is on its way."""
        return min(QUIET_S, self._lease_s)

    def _wait_for(self, seconds: float) -> None:
        waiting = self._waiting
        if waiting is not None and not waiting.expired():
            waiting.reschedule(asyncio.get_running_loop().time() + seconds)

    async def run(self) -> Received:
        """Receive until complete.

        Raises:
            CorruptFrame: frames were still missing after the resends.
            StaleFrame: the same, where what came instead was somebody else's.
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
                try:
                    # Confirmed before the staging buffer goes back and the caller frees the blocks.
                    await to_the_end(receive.cancel())
                finally:  # cancelled again meanwhile: late messages are to be turned away all the same
                    self._kit.transport.end(self._tag)

    async def _turn(self, receive: Receive, buffer: memoryview) -> Received | None:
        try:
            nbytes = await self._next_message(receive)
            taken = None if nbytes is None else await self._kit.copy(self._take, buffer, nbytes)
        except (CorruptFrame, Truncated) as error:
            self._refused = error
            self._obey(self.lease.corrupt())
            return None
        except StaleFrame as error:
            self._refused = error
            self._obey(self.lease.foreign())
            return None
        if nbytes is None or taken is None:
            self._obey(self.lease.quiet())
            return None
        self._count(taken, nbytes)
        frame, header = taken.frame, taken.frame.header
        if header.kind is FrameKind.KV_GROUP:
            self.lease.kv_message(header.sequence, _piece_of(header))
            return None
        verdict = self.lease.handover(header.total_messages - 1)
        self._obey(verdict)
        if not isinstance(verdict, Complete):
            return None
        return self._finished(pb.Handover.FromString(bytes(frame.payload)), frame)

    async def _next_message(self, receive: Receive) -> int | None:
        """Length of the next message; None when it is quiet and the record is in doubt."""
        limit: float | None = self._lease_s
        if self.lease.record_in_doubt:
            limit = self._patience_s
        elif not self._heard and not self._renewed:
            limit = None
        try:
            async with asyncio.timeout(limit) as self._waiting:
                nbytes = await receive.wait()
        except TimeoutError:
            if self.lease.record_in_doubt:
                return None
            self.lease.expire()
            raise LeaseLost(f"no KV block came for {self._lease_s:g} s") from None
        finally:
            self._heard = self._heard or receive.done
            self._waiting = None
        return nbytes

    def _take(self, buffer: memoryview, nbytes: int) -> _Taken:
        """Verify a frame and write its blocks to the pool; runs on the copy thread."""
        begun = time.monotonic()
        frame = open_frame(buffer, nbytes, self._expected)
        if frame.header.kind is FrameKind.KV_GROUP:
            self._write(frame)
        return _Taken(frame, time.monotonic() - begun)

    def _write(self, frame: Frame) -> None:
        header, piece = frame.header, _piece_of(frame.header)
        heads = range(header.head_start, header.head_start + header.head_count)
        self._check(frame, piece, heads)
        if self.lease.has(header.sequence):
            return
        if self.lease.overlaps(piece):
            raise StaleFrame(f"message {header.sequence} brings KV that is here already: {piece}")
        copied = self._scatter(frame, piece, heads)
        # Too late to keep damage out of the blocks, in time to keep it from counting as received: the
        # lease's blocks have no reader before all of them do.
        if copied != frame.blocks_digest:
            raise CorruptFrame(
                f"the digest of {len(frame.payload)} bytes of KV blocks does not hold"
            )

    def _check(self, frame: Frame, piece: Piece, heads: range) -> None:
        """Raise StaleFrame unless the frame carries what this lease can take, in a way it can."""
        header, layout, tokens = frame.header, self._kit.layout, piece.tokens
        inside = piece.layer_end <= layout.num_layers and tokens.stop <= self._prompt_tokens
        new = tokens.start >= self._first_token
        size = layout.block_size
        by_block = header.block_tokens == size and tokens.start % size == 0
        alike = by_block and heads == self._pool.heads
        readable = alike or (header.block_tokens == 1 and heads == self._heads)
        # A digest of blocks is taken again while all the heads of a pool are copied.
        checkable = frame.blocks_digest is None or heads == self._pool.heads
        of_ours = header.dtype_code == DTYPE_CODES[layout.dtype]
        wire = WireFormat(layout.dtype, max(header.block_tokens, 1), heads, layout.head_dim)
        whole = 0 < len(frame.payload) == wire.payload_bytes(piece)
        if not (inside and new and readable and checkable and of_ours and whole):
            raise StaleFrame(
                f"a frame of {len(frame.payload)} bytes, dtype {header.dtype_code}, for layers up to "
                f"{piece.layer_end}, tokens {tokens.start} to {tokens.stop} by {header.block_tokens}, "
                f"heads {heads.start} to {heads.stop}; the lease is of {layout.dtype}, "
                f"{layout.num_layers} layers, tokens {self._first_token} to {self._prompt_tokens} "
                f"by {size}, heads {self._heads.start} to {self._heads.stop}"
            )

    def _scatter(self, frame: Frame, piece: Piece, heads: range) -> bytes | None:
        size, tokens = self._pool.block_size, piece.tokens
        digest = frame.blocks_digest is not None
        if frame.header.block_tokens == size and heads == self._pool.heads:
            blocks = self._blocks[tokens.start // size : -(-tokens.stop // size)]
            return self._pool.scatter(
                piece.layer_start, piece.layer_end, blocks, frame.payload, digest=digest
            )
        return self._pool.scatter_tokens(
            piece.layer_start,
            piece.layer_end,
            self._blocks,
            tokens,
            frame.payload,
            heads=heads,
            digest=digest,
            clear_behind=tokens.stop == self._prompt_tokens,
        )

    def _count(self, taken: _Taken, nbytes: int) -> None:
        now_ns, header = time.time_ns(), taken.frame.header
        self._first_ns = self._first_ns or now_ns
        self._bytes += nbytes
        self._messages += 1
        if header.kind is FrameKind.KV_GROUP and not self.lease.has(header.sequence):
            self._notes.add(header.sequence, arrival_of(header, nbytes, taken.seconds, now_ns))

    def _obey(self, verdict: Verdict) -> None:
        match verdict:
            case Missing(numbers):
                self._on_missing(numbers)
            case Abandon(reason):
                foreign = isinstance(self._refused, StaleFrame)
                error = StaleFrame if foreign else CorruptFrame
                raise error(f"transfer given up: {reason}") from self._refused
            case Continue() | Complete():
                pass

    def _finished(self, handover: pb.Handover, frame: Frame) -> Received:
        return Received(
            handover=handover,
            prefill_trace=frame.header.trace,
            bytes=self._bytes,
            messages=self._messages,
            seconds=handover.send_seconds,
            exposed_seconds=max(0.0, time.time() - handover.computed_at),
            first_ns=self._first_ns,
            events=message_events(self._notes, handover, self._pool.block_size),
        )


def _piece_of(header: FrameHeader) -> Piece:
    return Piece(header.layer_start, header.layer_count, header.token_start, header.token_count)
