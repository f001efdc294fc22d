"""KV messages that are damaged, lost, repeated, late, or another transfer's."""

import random
from collections.abc import Sequence
from typing import ClassVar

from kvrelay_chaos.faults.base import Kind, Surroundings, between
from kvrelay_chaos.kv_plane import KvFault, KvOrder
from kvrelay_chaos.plan import Fault, Parameters
from kvrelay_chaos.shape import Shape


class _KvKind(Kind):
    """Waits in a prefill worker for the next message it sends."""

    fault: ClassVar[KvFault]
    cost_s = 0.1

    def targets(self, shape: Shape) -> Sequence[str]:
        return shape.prefill_workers

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        numbers = {name: float(value) for name, value in fault.parameters.items()}
        await around.stack.agents.kv_fault(fault.target, KvOrder(self.fault, **numbers))
        return True


class FlipBit(_KvKind):
    """One bit of a message is the other way round: of its header or of the blocks in it."""

    name = "kv_corrupt"
    weight = 16.0
    fault = "corrupt"

    def draw(self, dice: random.Random, target: str) -> Parameters:
        return {"at": dice.random()}


class Truncate(_KvKind):
    """Only the first part of a message arrives."""

    name = "kv_truncate"
    weight = 8.0
    fault = "truncate"

    def draw(self, dice: random.Random, target: str) -> Parameters:
        return {"at": dice.random()}


class DropKv(_KvKind):
    """A message is lost; its sender believes that it was sent."""

    name = "kv_drop"
    weight = 2.0
    fault = "drop"
    breaks = True


class DelayKv(_KvKind):
    """A message leaves late."""

    name = "kv_delay"
    weight = 12.0
    fault = "delay"

    def draw(self, dice: random.Random, target: str) -> Parameters:
        return {"seconds": between(dice, 0.01, 0.5)}


class DuplicateKv(_KvKind):
    """A message arrives twice."""

    name = "kv_duplicate"
    weight = 8.0
    fault = "duplicate"


class ForeignKv(_KvKind):
    """In the place of a message comes one of an earlier transfer: whole, sealed, and wrong here."""

    name = "kv_foreign"
    weight = 8.0
    fault = "foreign"


class SlowLink(_KvKind):
    """All messages of a worker crawl for a while."""

    name = "kv_slow_link"
    weight = 1.0
    cost_s = 0.3
    fault = "slow_link"

    def draw(self, dice: random.Random, target: str) -> Parameters:
        return {"seconds": between(dice, 0.2, 2.0), "bytes_per_s": between(dice, 2e5, 5e6)}


KV_KINDS = (FlipBit(), Truncate(), DropKv(), DelayKv(), DuplicateKv(), ForeignKv(), SlowLink())
