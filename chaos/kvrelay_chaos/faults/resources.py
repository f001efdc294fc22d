"""Things that run out, and a clock that jumps."""

import asyncio
import contextlib
import random
from collections.abc import Sequence

from kvrelay_chaos.agents import AgentLost
from kvrelay_chaos.faults.base import Kind, Surroundings, between
from kvrelay_chaos.plan import Fault, Parameters
from kvrelay_chaos.shape import Shape


class _OfWorker(Kind):
    """Something the agent in a worker does for a while; a worker that dies meanwhile has had it."""

    cost_s = 0.3

    def targets(self, shape: Shape) -> Sequence[str]:
        return shape.workers

    async def _ask(self, fault: Fault, around: Surroundings, do: str, **arguments: object) -> bool:
        """Until a worker of that name has done it and it meant something there."""
        while True:
            await around.stack.up(fault.target)
            with contextlib.suppress(AgentLost):
                if await around.stack.agents.ask(fault.target, do, **arguments):
                    return True
            await asyncio.sleep(0.05)


class ExhaustBlocks(_OfWorker):
    """All KV blocks that are free or cached are gone for a while."""

    name = "pool_exhausted"
    weight = 1.5

    def draw(self, dice: random.Random, target: str) -> Parameters:
        return {"seconds": between(dice, 0.05, 1.0)}

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        return await self._ask(fault, around, "hold_blocks", seconds=fault.parameters["seconds"])


class ExhaustStaging(_OfWorker):
    """All staging buffers that nobody holds are gone for a while."""

    name = "staging_exhausted"
    weight = 1.5

    def draw(self, dice: random.Random, target: str) -> Parameters:
        return {"seconds": between(dice, 0.05, 0.6)}

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        return await self._ask(fault, around, "hold_staging", seconds=fault.parameters["seconds"])


class ClockJump(_OfWorker):
    """The wall clock of a worker jumps, by seconds or by years, and later back."""

    name = "clock_jump"
    weight = 3.0
    cost_s = 0.1

    def draw(self, dice: random.Random, target: str) -> Parameters:
        offset = 10.0 ** between(dice, 0.0, 8.0) * dice.choice([-1, 1])
        return {"offset_s": float(f"{offset:.4g}"), "seconds": between(dice, 0.1, 3.0)}

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        return await self._ask(fault, around, "clock", **fault.parameters)


class FullDisk(Kind):
    """A worker is started again and finds no space left for caches and temporary files."""

    name = "full_disk"
    weight = 0.3
    cost_s = 0.8
    breaks = True
    exclusive = True

    def targets(self, shape: Shape) -> Sequence[str]:
        return shape.workers

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        process = around.stack.processes[fault.target]
        around.stack.full_disks.add(fault.target)
        if not process.terminate():
            return False
        await process.ended()
        await around.stack.up(fault.target)
        return True


RESOURCE_KINDS = (ExhaustBlocks(), ExhaustStaging(), ClockJump(), FullDisk())
