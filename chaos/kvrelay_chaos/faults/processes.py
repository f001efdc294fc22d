"""Processes that die, stop or are started again."""

import random
from collections.abc import Sequence

from kvrelay_chaos.faults.base import Kind, Surroundings, between
from kvrelay_chaos.plan import Fault, Parameters
from kvrelay_chaos.shape import Shape


class KillWorker(Kind):
    """SIGKILL: nothing is finished, nothing is said."""

    name = "kill_worker"
    weight = 1.6
    cost_s = 0.8
    breaks = True
    exclusive = True

    def targets(self, shape: Shape) -> Sequence[str]:
        return shape.workers

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        return around.stack.processes[fault.target].kill()


class KillRouter(Kind):
    """SIGKILL of a router: its clients see their connections break, its workers drop what they run."""

    name = "kill_router"
    weight = 0.3
    cost_s = 1.5
    breaks = True
    exclusive = True

    def targets(self, shape: Shape) -> Sequence[str]:
        return shape.router_names

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        return await around.stack.kill_router(fault.target)


class StopWorker(Kind):
    """SIGSTOP for less than it takes to be given up."""

    name = "stop_worker"
    weight = 0.8
    cost_s = 0.8
    breaks = True
    exclusive = True

    def targets(self, shape: Shape) -> Sequence[str]:
        return shape.workers

    def draw(self, dice: random.Random, target: str) -> Parameters:
        return {"seconds": between(dice, 0.05, 1.0)}

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        return await around.stack.processes[fault.target].pause(float(fault.parameters["seconds"]))


class StopWorkerLong(StopWorker):
    """SIGSTOP until the router has given the worker up; then it wakes and finds itself replaced."""

    name = "stop_worker_long"
    weight = 0.08
    cost_s = 3.0

    def draw(self, dice: random.Random, target: str) -> Parameters:
        return {"seconds": between(dice, 3.5, 6.0)}


class RestartWorker(Kind):
    """SIGTERM: it drains, ends, and another process takes its place."""

    name = "restart_worker"
    weight = 0.5
    cost_s = 0.8
    breaks = True
    exclusive = True

    def targets(self, shape: Shape) -> Sequence[str]:
        return shape.workers

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        process = around.stack.processes[fault.target]
        if not process.terminate():
            return False
        await process.ended()
        return True


PROCESS_KINDS = (KillWorker(), KillRouter(), StopWorker(), StopWorkerLong(), RestartWorker())
