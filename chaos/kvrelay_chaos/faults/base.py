"""What a kind of fault is."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvrelay_chaos.armed import Waiting
from kvrelay_chaos.plan import Fault, Parameters
from kvrelay_chaos.shape import Shape
from kvrelay_chaos.stack import Stack


@dataclass(frozen=True, slots=True)
class ClientOrder:
    """What one client of the load is to do with its next stream."""

    leaves: bool
    """Goes away; else it stops reading for a while."""
    after_pieces: int
    """Pieces of text that it reads before."""
    seconds: float = 0.0
    """Of not reading."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What there is to break."""

    stack: Stack
    clients: Waiting[ClientOrder]


class Kind(ABC):
    """One way in which things go wrong. Objects hold no state: a fault's is in its parameters."""

    name: ClassVar[str]
    weight: ClassVar[float]
    """How often it is drawn, relative to the others."""
    cost_s: ClassVar[float]
    """Mean pause after it, in seconds."""
    breaks: ClassVar[bool] = False
    """It may cost a running request its worker: time to error and recovery gaps count from it."""
    exclusive: ClassVar[bool] = False
    """It ends or stops its target: one at a time, and only while the target does its work."""

    @abstractmethod
    def targets(self, shape: Shape) -> Sequence[str]:
        """What it can hit."""

    def draw(self, dice: random.Random, target: str) -> Parameters:
        """Parameters of one fault; most kinds have none."""
        return {}

    @abstractmethod
    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        """Carry it out. Returns whether it hit something; waits where it has to, to be sure that it does."""


def between(dice: random.Random, low: float, high: float) -> float:
    """A number of at most four digits, so that a printed plan says all."""
    return float(f"{dice.uniform(low, high):.4g}")
