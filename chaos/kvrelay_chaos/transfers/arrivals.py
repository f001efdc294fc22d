"""How many bytes of a transfer have arrived, seen in the memory they arrive in."""

import numpy as np

from kvrelay_chaos.transfers.side import Side

_NEAR = 16
"""Bytes that are compared to see whether one has arrived; noise may repeat a single one."""


class Arrivals:
    """Counts from its making. Looks at the one staging buffer without holding it.

    Whole messages are the transport's to count. Of the message on its way, everything up to the last
    byte that differs from what the buffer held when the message before it ended has arrived; KV is
    noise, so next to no byte stays as it was.
    """

    def __init__(self, side: Side) -> None:
        (memory,) = side.staging_memory  # of several nobody could tell which one fills
        self._stats = side.kit.transport.stats
        self._memory = np.frombuffer(memoryview(memory), np.uint8)
        self._start = self._stats.bytes_received
        self._messages = self._stats.messages_received
        self._before = self._memory.copy()

    def reached(self, nbytes: int) -> bool:
        """Whether that many bytes are here. Cheap, to be asked often."""
        self._notice_message()
        rest = nbytes - self._whole
        if rest <= 0:
            return True
        near = slice(max(0, rest - _NEAR), min(rest, len(self._memory)))
        return bool((self._memory[near] != self._before[near]).any())

    def count(self) -> int:
        """Bytes that are here: headers, KV and record."""
        self._notice_message()
        changed = np.flatnonzero(self._memory != self._before)
        return self._whole + (int(changed[-1]) + 1 if len(changed) else 0)

    @property
    def _whole(self) -> int:
        return self._stats.bytes_received - self._start

    def _notice_message(self) -> None:
        if self._stats.messages_received != self._messages:
            self._messages = self._stats.messages_received
            self._before = self._memory.copy()
