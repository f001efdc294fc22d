"""The real UCX transport, but that messages on their way out can be damaged, lost, repeated or held up."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from kvrelay_chaos.armed import Armed, Waiting
from kvrelay_protocol.errors import TransferError
from kvrelay_transfer.transport import Buffer, readable_bytes
from kvrelay_transfer.ucx import UcxTransport

KvFault: TypeAlias = Literal[
    "corrupt", "truncate", "drop", "delay", "duplicate", "foreign", "slow_link"
]


@dataclass(frozen=True, slots=True)
class KvOrder:
    """What is to happen to one message, or with a slow link to all of them for a while."""

    fault: KvFault
    at: float = 0.0
    """corrupt: which bit, truncate: how many of the bytes are left; as a fraction from 0 to 1."""
    seconds: float = 0.0
    """Of a delay, or for how long the link is slow."""
    bytes_per_s: float = 0.0
    """Of a slow link."""


@dataclass(slots=True)
class KvPlane:
    """The faults of one process's transport."""

    orders: Waiting[KvOrder] = field(default_factory=Waiting)
    slow_until: float = 0.0
    """By the loop's clock."""
    bytes_per_s: float = 0.0
    last: tuple[int, bytes] | None = None
    """Tag and bytes of a message sent earlier: whole, well sealed, and of another transfer."""


PLANE = KvPlane()
"""Of this process. The transport is built by its name, so this is where the two meet."""


class FaultyUcxTransport(UcxTransport):
    """See the module."""

    async def send(self, peer: bytes, tag: int, buffer: Buffer) -> None:
        message = readable_bytes(buffer)
        try:
            # A transfer may be cancelled here: an order taken before would be lost with it.
            await self._linger(len(message))
            foreign = PLANE.last is not None and PLANE.last[0] != tag
            armed = PLANE.orders.take(lambda order: order.fault != "foreign" or foreign)
            if PLANE.orders and PLANE.last is None:
                PLANE.last = (tag, bytes(message))
            if armed is None:
                await super().send(peer, tag, message)
            else:
                await self._send_faulted(peer, tag, message, armed)
        finally:
            message.release()

    async def _linger(self, nbytes: int) -> None:
        if asyncio.get_running_loop().time() < PLANE.slow_until:
            await asyncio.sleep(nbytes / PLANE.bytes_per_s)

    async def _send_faulted(
        self, peer: bytes, tag: int, message: memoryview, armed: Armed[KvOrder]
    ) -> None:
        order = armed.order
        armed.fire()
        match order.fault:
            case "drop":
                return
            case "corrupt":
                await super().send(peer, tag, flipped(message, order.at))
            case "truncate":
                await super().send(peer, tag, message[: int(order.at * len(message))])
            case "foreign":
                assert PLANE.last is not None  # noqa: S101 - or the order had not been taken
                stranger, PLANE.last = PLANE.last[1], None
                await super().send(peer, tag, stranger)
            case "duplicate":
                await super().send(peer, tag, message)
                # Turned away where the transfer has ended meanwhile; that is nothing to the sender.
                with contextlib.suppress(TransferError):
                    await super().send(peer, tag, message)
            case "delay":
                await asyncio.sleep(order.seconds)
                await super().send(peer, tag, message)
            case "slow_link":
                PLANE.slow_until = asyncio.get_running_loop().time() + order.seconds
                PLANE.bytes_per_s = order.bytes_per_s
                await self._linger(len(message))
                await super().send(peer, tag, message)


def flipped(message: memoryview, at: float) -> bytearray:
    """A copy with one bit the other way round, `at` 0 the first and towards 1 the last."""
    copy = bytearray(message)
    bit = min(int(at * len(copy) * 8), len(copy) * 8 - 1)
    copy[bit // 8] ^= 1 << bit % 8
    return copy
