"""Writes to clients, gathered: each client gets one write for all that one loop turn brought it."""

import asyncio
from collections.abc import Callable

_CROWD = 32
"""From here on the writes themselves take so long that looking for more tokens first costs nothing."""
_QUIET_TURNS = 2
_MAX_ROUNDS = 8


class Outbox:
    """The clients that something waits for. One for each server.

    Few of them are written to at the end of the loop turn, so that a lone token is never held back.
    When a step of a big batch arrives for many, and the step after it is there already, the router is
    behind its workers: then both leave in one write, up to a limit.

    ```
    add ─► end of this turn ─► few: write
                             └► many: two turns without anything new, or 8 rounds of it ─► write
    ```
    """

    def __init__(self) -> None:
        self._flushes: list[Callable[[], None]] = []
        self.added = 0
        """Counts what those who wait already got on top."""
        self._seen = 0
        self._quiet_turns = 0
        self._rounds = 0

    def add(self, flush: Callable[[], None]) -> None:
        """Call `flush` once, soon."""
        if not self._flushes:
            self._quiet_turns = self._rounds = self._seen = self.added = 0
            asyncio.get_running_loop().call_soon(self._turn)
        self._flushes.append(flush)

    def _turn(self) -> None:
        if self._hold():
            asyncio.get_running_loop().call_soon(self._turn)
            return
        flushes, self._flushes = self._flushes, []
        for flush in flushes:
            flush()

    def _hold(self) -> bool:
        if len(self._flushes) < _CROWD or self._rounds >= _MAX_ROUNDS:
            return False
        if self.added != self._seen:
            self._seen = self.added
            self._rounds += 1
            self._quiet_turns = 0
            return True
        self._quiet_turns += 1
        return self._quiet_turns <= _QUIET_TURNS
