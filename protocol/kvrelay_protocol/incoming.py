"""What comes over a Join stream: each written message once, in order, or not at all.

Both directions are numbered (`outgoing.py`). gRPC over one connection neither loses nor repeats, but
what stands between two hosts may, and so may a defect of ours: then everything that either side
believes of the other is in doubt, and only a new stream is sure.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.outgoing import each

M = TypeVar("M", pb.WorkerMessage, pb.RouterMessage)


class MessageMissing(Exception):
    """A message came before the one that was due: the stream must end."""

    def __init__(self, due: int, came: int) -> None:
        super().__init__(f"message {due} is missing ({came} came)")


class Incoming(Generic[M]):
    """One direction of one stream, after the first message, which has no number."""

    def __init__(self) -> None:
        self._last = 0

    def take(self, message: M, handle: Callable[[M], None]) -> bool:
        """Handle what is in a message, if it is the next one.

        Returns:
            False for a repeat, which is dropped.

        Raises:
            MessageMissing: it is not the next one; nothing was handled.
            Exception: what `handle` raised, see `each`.
        """
        number = message.number
        if number <= self._last:
            return False
        if number != self._last + 1:
            raise MessageMissing(self._last + 1, number)
        self._last = number
        each(message, handle)
        return True
