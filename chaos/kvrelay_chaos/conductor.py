"""Carries a plan out: every fault at its time, quiet points in between, until all have hit."""

import asyncio
import time
from collections.abc import Callable
from functools import partial

from kvrelay_chaos.faults import BY_NAME, Kind, Surroundings
from kvrelay_chaos.faults.base import ClientOrder
from kvrelay_chaos.leaks import wait_settled
from kvrelay_chaos.ledger import Fired, Ledger
from kvrelay_chaos.load import Load
from kvrelay_chaos.plan import Fault, Plan

NUDGE_AFTER_S = 5.0
"""A fault that has waited so long for a message gets help: see `Conductor._nudge`."""
NUDGE_S = 0.5
LEAVING = 4
STALL_S = 60.0
"""Without a single hit for so long, what is left finds nothing to hit."""
_POLL_S = 0.1
_MAX_OPEN = 64
"""Faults that wait for something to hit; more would only make the run's end longer than its plan."""


class Conductor:
    """Owns the faults under way and the clock that they go by."""

    def __init__(self, plan: Plan, around: Surroundings, load: Load, ledger: Ledger) -> None:
        self._plan = plan
        self._around = around
        self._load = load
        self._ledger = ledger
        self._open: dict[asyncio.Task[None], Fault] = {}
        self._exclusive: set[asyncio.Task[None]] = set()
        """Those among them that end or stop something."""
        self._locks: dict[str, asyncio.Lock] = {}
        self._nudge_at: dict[asyncio.Task[None], float] = {}
        self._nudges: dict[str, asyncio.Task[None]] = {}
        """Workers that are held up for the sake of a fault."""
        self._paused_s = 0.0
        self._last_hit = time.monotonic()

    async def run(
        self,
        *,
        quiet_every_s: float,
        say: Callable[[str], None],
        stop: asyncio.Event,
        until_s: float = 0.0,
    ) -> None:
        """Until every fault has hit, and at least for `until_s` seconds.

        Ends early when `stop` is set, or when nothing was hit for `STALL_S`.
        """
        began = quiet_at = time.monotonic()
        waiting = list(reversed(self._plan.faults))
        try:
            while not stop.is_set():
                now = time.monotonic()
                elapsed = now - began - self._paused_s
                self._raise_failures()
                while waiting and waiting[-1].at_s <= elapsed and len(self._open) < _MAX_OPEN:
                    self._begin(waiting.pop())
                if now - quiet_at > quiet_every_s:
                    await self._quiet(say)
                    quiet_at = time.monotonic()
                    self._paused_s += quiet_at - now
                if not waiting and not self._open and elapsed >= until_s:
                    return
                self._nudge_waiting()
                stuck = not waiting or len(self._open) >= _MAX_OPEN
                if self._open and stuck and time.monotonic() - self._last_hit > STALL_S:
                    self._give_up(say)
                await asyncio.sleep(_POLL_S)
        finally:
            left = [*self._open, *self._nudges.values()]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def settle(self) -> None:
        """Wait until nothing runs, and write down what is still held then."""
        stack = self._around.stack
        if self._exclusive:
            await asyncio.wait(set(self._exclusive))
        async with self._load.paused():
            await stack.all_up()
            seconds, leaks = await wait_settled(stack)
        self._ledger.quiet_points += 1
        self._ledger.settled.append(seconds)
        self._ledger.leaks += leaks

    def _begin(self, fault: Fault) -> None:
        kind = BY_NAME[fault.kind]
        task = asyncio.create_task(self._fire(fault, kind), name=str(fault))
        self._open[task] = fault
        self._nudge_at[task] = time.monotonic() + NUDGE_AFTER_S
        task.add_done_callback(self._nudge_at.pop)
        if kind.exclusive:
            self._exclusive.add(task)
            task.add_done_callback(self._exclusive.discard)

    def _nudge_waiting(self) -> None:
        now = time.monotonic()
        for task, fault in self._open.items():
            if self._nudge_at.get(task, now + 1) > now or task in self._exclusive:
                continue
            self._nudge_at[task] = now + NUDGE_AFTER_S
            if fault.parameters.get("message") == "cancel":
                self._leave_early()
            for rival in self._around.stack.shape.rivals(fault.target):
                if rival not in self._nudges:
                    nudge = self._nudges[rival] = asyncio.create_task(self._nudge(rival))
                    nudge.add_done_callback(partial(self._nudged, rival))

    def _leave_early(self) -> None:
        """Have a few clients leave: only then are there cancels."""
        for _ in range(LEAVING):
            self._around.clients.arm(ClientOrder(leaves=True, after_pieces=1))
        self._ledger.nudges += 1

    def _nudged(self, rival: str, _nudge: asyncio.Task[None]) -> None:
        del self._nudges[rival]

    async def _nudge(self, rival: str) -> None:
        """Hold up a worker that gets all the work, so that a fault's target gets some.

        A router that finds one idle worker a little faster than another one gives it everything.
        """
        async with self._locks.setdefault(rival, asyncio.Lock()):
            await self._around.stack.up(rival)
            await self._around.stack.processes[rival].pause(NUDGE_S)
        self._ledger.nudges += 1

    async def _fire(self, fault: Fault, kind: Kind) -> None:
        if not kind.exclusive:
            hit = await kind.fire(fault, self._around)
            self._note(fault, kind, time.monotonic(), hit=hit)
            return
        async with self._locks.setdefault(fault.target, asyncio.Lock()):
            while True:
                await self._around.stack.up(fault.target)
                began = time.monotonic()
                if await kind.fire(fault, self._around):
                    break
        self._note(fault, kind, began, hit=True)

    def _note(self, fault: Fault, kind: Kind, at: float, *, hit: bool) -> None:
        self._last_hit = time.monotonic()
        if hit:
            self._ledger.fired.append(Fired(fault, at, kind.breaks))
        else:
            self._ledger.missed[fault.kind] += 1

    def _raise_failures(self) -> None:
        failure = self._load.failure()
        if failure is not None:
            raise failure
        for task in [task for task in self._open if task.done()]:
            del self._open[task]
            task.result()

    def _give_up(self, say: Callable[[str], None]) -> None:
        for task, fault in self._open.items():
            say(f"found nothing to hit: {fault}")
            task.cancel()
        self._ledger.missed.update(fault.kind for fault in self._open.values())
        self._open.clear()

    async def _quiet(self, say: Callable[[str], None]) -> None:
        await self.settle()
        ledger = self._ledger
        say(
            f"{len(ledger.fired):>6} faults, {len(ledger.outcomes):>6} requests, "
            f"{len(ledger.bad)} not good, {len(ledger.leaks)} leaks, "
            f"{len(self._open)} faults waiting; all blocks back after {ledger.settled[-1]:.1f} s"
        )
