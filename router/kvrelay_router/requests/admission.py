"""The bounded queue in front of placement, and what it can say about waiting times."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from kvrelay_protocol.errors import QueueFull

_T = TypeVar("_T")

RATE_WINDOW = 32
MIN_RETRY_S = 1.0
MAX_RETRY_S = 30.0


class DrainRate:
    """How fast requests get through, from the last endings."""

    def __init__(self) -> None:
        self._ended_at: deque[float] = deque(maxlen=RATE_WINDOW)

    def ended(self, at: float) -> None:
        self._ended_at.append(at)

    def eta_s(self, position: int) -> float | None:
        """Seconds until `position` more requests will have ended; None before two did."""
        if len(self._ended_at) < 2:
            return None
        span = self._ended_at[-1] - self._ended_at[0]
        return position * span / (len(self._ended_at) - 1)

    def retry_after_s(self, position: int) -> float:
        """A polite time to come back, within fixed bounds."""
        eta = self.eta_s(position)
        return MIN_RETRY_S if eta is None else min(MAX_RETRY_S, max(MIN_RETRY_S, eta))


class WaitingLine(Generic[_T]):
    """First come, first served; leaving from the middle costs the same as from the front."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: dict[_T, None] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[_T]:
        return iter(tuple(self._items))

    def __contains__(self, item: _T) -> bool:
        return item in self._items

    def check_room(self, rate: DrainRate) -> None:
        """Raises: QueueFull, where one more would exceed the limit."""
        if len(self._items) >= self._limit:
            raise QueueFull(
                f"{len(self._items)} requests wait already, the limit is {self._limit}",
                retry_after_s=rate.retry_after_s(len(self._items)),
            )

    def add(self, item: _T) -> int:
        """Returns the position, counted from 1."""
        self._items[item] = None
        return len(self._items)

    def discard(self, item: _T) -> None:
        self._items.pop(item, None)
