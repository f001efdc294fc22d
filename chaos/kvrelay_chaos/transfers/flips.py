"""Flipped bits: one random bit of one random message of each transfer, in header, payload or record."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from kvrelay_chaos.transfers.side import FIRST_TOKEN, Shape, Side, outcome_of
from kvrelay_transfer.frames import HEADER_SIZE
from kvrelay_transfer.inproc import InprocTransport
from kvrelay_transfer.layout import WireFormat, split
from kvrelay_transfer.lease import OpenLease
from kvrelay_transfer.transport import Buffer, readable_bytes

SHAPE = Shape(
    num_layers=4,
    num_kv_heads=2,
    head_dim=16,
    block_size=4,
    blocks=12,
    num_blocks=768,
    staging_bytes=HEADER_SIZE + 12 * 1024,
    lease_s=30.0,
    deadline_s=120.0,
)
"""24 KiB of KV in two messages, and the record."""
AT_ONCE = 64
"""Transfers side by side: one whose record is damaged mostly waits to ask for it again."""


@dataclass(slots=True)
class FlipReport:
    """What became of the flipped bits."""

    flips: int = 0
    detected: int = 0
    """The receiver refused the frame and counted it."""
    exact: int = 0
    """The receiver's blocks equal the sender's afterwards, and the record says what it should."""
    where: Counter[str] = field(default_factory=Counter)
    """Flips by place: `header` or `payload` of a message of blocks, `record header`, `record`."""
    failures: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """Whether every flip was detected and mended."""
        whole = self.detected == self.exact == self.flips
        return whole and not self.failures and not self.leaks


@dataclass(slots=True)
class _Flip:
    """One bit to flip. `message` counts what is sent with the tag."""

    message: int
    of: int
    in_header: bool
    sent: int = 0
    where: str = ""


class _Flipper(InprocTransport):
    """Flips one random bit of one message of each transfer that it was told of."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.flips: dict[int, _Flip] = {}
        self._rng = rng

    def plan(self, tag: int, messages: int) -> _Flip:
        """Choose a message; a quarter of the flips go into headers, which are small."""
        flip = _Flip(self._rng.randrange(messages), messages, self._rng.random() < 0.25)
        self.flips[tag] = flip
        return flip

    async def send(self, peer: bytes, tag: int, buffer: Buffer) -> None:
        flip = self.flips.get(tag)
        if flip is not None:
            if flip.sent == flip.message:
                buffer = self._damaged(flip, buffer)
            flip.sent += 1
        await super().send(peer, tag, buffer)

    def _damaged(self, flip: _Flip, buffer: Buffer) -> bytearray:
        data = bytearray(readable_bytes(buffer))
        bit = self._rng.randrange(8 * (HEADER_SIZE if flip.in_header else len(data)))
        data[bit // 8] ^= 1 << bit % 8
        record = "record " if flip.message == flip.of - 1 else ""
        flip.where = record + ("header" if bit < 8 * HEADER_SIZE else "payload")
        return data


async def flip_bits(count: int, seed: int, shape: Shape = SHAPE) -> FlipReport:
    """`count` transfers within this process, one flipped bit in each."""
    transport = _Flipper(random.Random(seed))
    sender = await Side.start(shape, transport, staging_count=AT_ONCE, seed=seed)
    receiver = await Side.start(shape, InprocTransport(), staging_count=AT_ONCE)
    report = FlipReport()
    begun = time.monotonic()
    try:
        for start in range(0, count, AT_ONCE):
            batch = min(AT_ONCE, count - start)
            await asyncio.gather(*(_one(transport, sender, receiver, report) for _ in range(batch)))
            transport.flips.clear()
            report.leaks += sender.leaks() + receiver.leaks()
    finally:
        await sender.kit.close()
        await receiver.kit.close()
    report.seconds = time.monotonic() - begun
    return report


async def _one(flipper: _Flipper, left: Side, right: Side, report: FlipReport) -> None:
    """One transfer of KV nobody sent before, damaged once."""
    source, target = left.take(leased=False), right.take(leased=True)
    left.refill(source)
    sender = left.sender(source)
    planned: list[_Flip] = []

    def granted(lease: OpenLease) -> None:
        planned.append(flipper.plan(lease.tag, messages_of(left.shape, lease)))
        sender.open(lease)

    receiver = right.receiver(
        target, granted, on_missing=lambda numbers: sender.resend(list(numbers))
    )
    sending = asyncio.create_task(sender.run())
    receiving = asyncio.create_task(receiver.run())
    error = await outcome_of(receiving)
    sender.release()
    error = error or await outcome_of(sending)
    (flip,) = planned
    report.flips += 1
    report.where[flip.where] += 1
    report.detected += receiver.lease.corrupt_frames == 1
    if error is not None:
        report.failures.append(f"{flip.where}: {error!r}")
    elif left.digest(source) == right.digest(target):
        report.exact += receiving.result().handover.first_token == FIRST_TOKEN
    left.allocator.release(source.blocks)
    right.allocator.release(target.blocks)


def messages_of(shape: Shape, lease: OpenLease) -> int:
    """Messages of one transfer, the record included."""
    payload = lease.max_message_bytes - HEADER_SIZE
    wire = WireFormat.between(shape.layout, lease.layout)
    tokens = range(shape.blocks * shape.block_size)
    return len(split(wire, range(shape.num_layers), tokens, payload)) + 1
