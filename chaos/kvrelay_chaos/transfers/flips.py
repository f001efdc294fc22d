"""Flipped bits: one random bit of one random message of each transfer, in header, payload or record."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from kvrelay_chaos.transfers.side import FIRST_TOKEN, Shape, Side, outcome_of
from kvrelay_transfer.frames import HEADER_SIZE
from kvrelay_transfer.inproc import Fault, Faults, InprocTransport
from kvrelay_transfer.lease import OpenLease

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
"""24 KiB of KV in two messages and a record; small, so that headers and record are hit often too."""
AT_ONCE = 64
"""Transfers that run side by side: one whose record is damaged mostly waits."""


@dataclass(slots=True)
class FlipReport:
    """What became of the flipped bits."""

    flips: int = 0
    detected: int = 0
    """The receiver refused the frame and counted it."""
    exact: int = 0
    """The receiver's blocks equal the sender's afterwards, and the record says what it said."""
    where: Counter[str] = field(default_factory=Counter)
    """Flips in the header, in the payload of blocks, in the record."""
    failures: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """Whether every flip was detected and mended."""
        whole = self.detected == self.exact == self.flips
        return whole and not self.failures and not self.leaks


class _Flipper(InprocTransport):
    """Flips one random bit of the chosen message of each tag."""

    def __init__(self, rng: random.Random) -> None:
        self.plan = Faults()
        super().__init__(faults=self.plan)
        self._rng = rng

    def flip(self, tag: int, messages: list[int]) -> str:
        """Plan a flip for one transfer of messages of these sizes; returns what it hits."""
        nth = self._rng.randrange(len(messages))
        # Header and payload alike: half of the flips would miss a header of 160 bytes in 12 KiB.
        in_header = self._rng.random() < 0.5 if nth < len(messages) - 1 else False
        bit = self._rng.randrange(8 * (HEADER_SIZE if in_header else messages[nth]))
        self.plan.plan.append(Fault("corrupt", nth=nth, tag=tag, at=bit))
        if nth == len(messages) - 1:
            return "record"
        return "header" if bit < 8 * HEADER_SIZE else "payload"


async def flip_bits(count: int, seed: int, shape: Shape = SHAPE) -> FlipReport:
    """`count` transfers with one flipped bit each, on the transport within a process."""
    rng = random.Random(seed)
    begun = time.monotonic()
    transport = _Flipper(rng)
    sender = await Side.start(shape, transport, staging_count=2 * AT_ONCE, seed=seed)
    receiver = await Side.start(shape, InprocTransport(), staging_count=AT_ONCE)
    report = FlipReport()
    try:
        for start in range(0, count, AT_ONCE):
            batch = min(AT_ONCE, count - start)
            await asyncio.gather(
                *(_one(transport, sender, receiver, report) for _ in range(batch))
            )
            transport.plan.forget()
            report.leaks += sender.leaks() + receiver.leaks()
    finally:
        await sender.kit.close()
        await receiver.kit.close()
    report.seconds = time.monotonic() - begun
    return report
