"""What is noted of every message of a transfer, in bounded memory."""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_NOTES = 64
"""Beyond as many messages, neighbours are noted together: 2, then 4, then 8 of them."""


class MessageNotes(Generic[T]):
    """Notes by message number. Two sides that saw the same numbers have merged the same ones."""

    def __init__(self, merge: Callable[[T, T], T]) -> None:
        """Args: `merge` of the note of some messages and that of later ones, or of one sent again."""
        self._merge = merge
        self._stride = 1
        self._notes: dict[int, T] = {}

    def add(self, number: int, note: T) -> None:
        """Note something about message `number`, counted from 0."""
        while number // self._stride >= MAX_NOTES:
            self._double()
        self._put(self._notes, number // self._stride, note)

    @property
    def in_order(self) -> list[T]:
        """At most `MAX_NOTES`, by message number."""
        return [note for _, note in sorted(self._notes.items())]

    def _double(self) -> None:
        self._stride *= 2
        merged: dict[int, T] = {}
        for index, note in sorted(self._notes.items()):
            self._put(merged, index // 2, note)
        self._notes = merged

    def _put(self, notes: dict[int, T], index: int, note: T) -> None:
        notes[index] = self._merge(notes[index], note) if index in notes else note
