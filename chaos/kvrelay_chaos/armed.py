"""Faults that wait for something to happen to: each is taken by the first thing that fits it."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Armed(Generic[T]):
    """An order that has not hit anything yet."""

    order: T
    hit: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def fire(self) -> None:
        """It hit something: whoever armed it is told."""
        if not self.hit.done():
            self.hit.set_result(None)


class Waiting(Generic[T]):
    """Armed orders in the order in which they came. One event loop owns it."""

    def __init__(self) -> None:
        self._armed: deque[Armed[T]] = deque()

    def __len__(self) -> int:
        return len(self._armed)

    def arm(self, order: T) -> Armed[T]:
        armed = Armed(order)
        self._armed.append(armed)
        return armed

    async def until_hit(self, order: T) -> None:
        """Arm an order and wait for its turn; cancelling the wait disarms it."""
        armed = self.arm(order)
        try:
            await armed.hit
        finally:
            self.disarm(armed)

    def rearm(self, armed: Armed[T]) -> None:
        """Put back what was taken and did not hit; it goes first."""
        if not armed.hit.done():
            self._armed.appendleft(armed)

    def disarm(self, armed: Armed[T]) -> None:
        if armed in self._armed:
            self._armed.remove(armed)

    def take(self, fits: Callable[[T], bool] = lambda _order: True) -> Armed[T] | None:
        """The first order that fits, which is no longer armed then; the taker calls `fire`."""
        for armed in self._armed:
            if fits(armed.order):
                self._armed.remove(armed)
                return armed
        return None
