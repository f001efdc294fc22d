"""Join streams that lose, repeat, hold up and mix up messages, freeze and break."""

import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, cast

from kvrelay_chaos.faults.base import Kind, Surroundings, between
from kvrelay_chaos.plan import Fault, Parameters
from kvrelay_chaos.proxy import ANY, Direction, MessageFault, MessageOrder
from kvrelay_chaos.shape import Shape

# Messages that a request can't do without. A fault waits for one of its kind, on the lane it travels on.
_FROM_PREFILL = ("step_output", "sequence_started", "kv_sent")
_FROM_DECODE = ("step_output", "lease_granted", "kv_received")
_TO_PREFILL = ("submit_prefill", "open_transfer", "release_kv")
_TO_DECODE = ("submit_decode", "cancel")


class _OnLink(Kind):
    breaks = True

    def targets(self, shape: Shape) -> Sequence[str]:
        return shape.links


class _Message(_OnLink):
    """Something happens to one message."""

    fault: ClassVar[MessageFault]
    cost_s = 0.15

    def draw(self, dice: random.Random, target: str) -> Parameters:
        direction: Direction = "up" if dice.random() < 0.5 else "down"
        return {"direction": direction, "message": dice.choice(_messages(target, direction))}

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        given = fault.parameters
        direction = cast("Direction", given["direction"])
        seconds = float(given.get("seconds", 0.0))
        order = MessageOrder(self.fault, str(given["message"]), seconds)
        await around.stack.proxies[fault.target].lanes[direction].orders.until_hit(order)
        return True


def _messages(link: str, direction: Direction) -> list[str]:
    """What a fault may wait for there: any message as often as one of those that matter."""
    prefill = link.startswith("prefill")
    if direction == "down":
        return _half_any(_TO_PREFILL if prefill else _TO_DECODE)
    return _half_any(_FROM_PREFILL if prefill else _FROM_DECODE)


def _half_any(named: Sequence[str]) -> list[str]:
    return [ANY] * len(named) + list(named)


class DelayMessage(_Message):
    """One message comes late, and with it all that are behind it."""

    name = "join_delay"
    weight = 12.0
    fault = "delay"
    breaks = False
    cost_s = 0.1

    def draw(self, dice: random.Random, target: str) -> Parameters:
        return {**super().draw(dice, target), "seconds": between(dice, 0.01, 0.4)}


class DropMessage(_Message):
    """One message is lost."""

    name = "join_drop"
    weight = 3.0
    fault = "drop"


class DuplicateMessage(_Message):
    """One message comes twice."""

    name = "join_duplicate"
    weight = 3.0
    fault = "duplicate"


class ReorderMessage(_Message):
    """One message comes after the one behind it."""

    name = "join_reorder"
    weight = 3.0
    fault = "reorder"


class _Stream(_OnLink):
    """Something happens to a whole stream, as soon as it is open."""

    exclusive = True

    @abstractmethod
    async def _break(self, fault: Fault, around: Surroundings) -> bool: ...

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        return await self._break(fault, around)


class CutStream(_Stream):
    """The connection between a worker and a router breaks."""

    name = "join_cut"
    weight = 1.5
    cost_s = 0.3

    async def _break(self, fault: Fault, around: Surroundings) -> bool:
        return around.stack.proxies[fault.target].cut()


class FreezeStream(_Stream):
    """Nothing comes through in either direction for a while; the connection stays."""

    name = "join_freeze"
    weight = 0.5
    cost_s = 0.5

    def draw(self, dice: random.Random, target: str) -> Parameters:
        # Mostly short; some for longer than a silent worker is trusted.
        seconds = between(dice, 3.5, 5.0) if dice.random() < 0.15 else between(dice, 0.1, 1.0)
        return {"seconds": seconds}

    async def _break(self, fault: Fault, around: Surroundings) -> bool:
        return await around.stack.proxies[fault.target].freeze(float(fault.parameters["seconds"]))


CONTROL_KINDS = (
    DelayMessage(),
    DropMessage(),
    DuplicateMessage(),
    ReorderMessage(),
    CutStream(),
    FreezeStream(),
)
