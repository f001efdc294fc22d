"""How a plan is carried out, with kinds and a stack that do nothing by themselves."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from kvrelay_chaos import conductor
from kvrelay_chaos.armed import Waiting
from kvrelay_chaos.conductor import Conductor
from kvrelay_chaos.faults import Surroundings
from kvrelay_chaos.faults.base import Kind
from kvrelay_chaos.ledger import Leak, Ledger
from kvrelay_chaos.plan import Fault, Plan
from kvrelay_chaos.shape import Shape

SHAPE = Shape(prefill=2, decode=2, routers=1)


class Instant(Kind):
    name, breaks = "instant", True

    def __init__(self) -> None:
        self.fired: list[int] = []

    def targets(self, shape):
        return shape.workers

    async def fire(self, fault, around):
        self.fired.append(fault.number)
        return True


class Alone(Instant):
    """Takes some turns of the loop, and misses at first."""

    name, exclusive = "alone", True

    def __init__(self) -> None:
        super().__init__()
        self.running = 0

    async def fire(self, fault, around):
        assert self.running == 0
        self.running += 1
        await asyncio.sleep(0.01)
        self.running -= 1
        self.fired.append(fault.number)
        return len(self.fired) > 1


class Never(Instant):
    name = "never"

    async def fire(self, fault, around):
        await asyncio.Event().wait()
        return False


class FakeStack:
    shape = SHAPE

    def __init__(self) -> None:
        self.paused: list[str] = []
        self.processes = {
            name: SimpleNamespace(pause=self._pause_of(name)) for name in SHAPE.workers
        }

    def _pause_of(self, name):
        async def pause(seconds):
            self.paused.append(name)
            return True

        return pause

    async def up(self, name): ...

    async def all_up(self): ...


class FakeLoad:
    """No clients; `failure` is what one of them would have raised."""

    broken: BaseException | None = None

    def failure(self):
        return self.broken

    @contextlib.asynccontextmanager
    async def paused(self):
        yield


@pytest.fixture
def kinds(monkeypatch) -> dict[str, Instant]:
    made = {kind.name: kind for kind in (Instant(), Alone(), Never())}
    monkeypatch.setattr(conductor, "BY_NAME", made)
    monkeypatch.setattr(conductor, "_POLL_S", 0.001)
    return made


@pytest.fixture
def settled(monkeypatch) -> list[Leak]:
    """What a quiet point finds."""
    leaks: list[Leak] = []

    async def wait_settled(stack):
        return 0.5, leaks

    monkeypatch.setattr(conductor, "wait_settled", wait_settled)
    return leaks


class Run:
    def __init__(self, *faults: tuple[str, str], **parameters: str) -> None:
        planned = (Fault(n, *f, n * 0.001, parameters) for n, f in enumerate(faults))
        self.plan = Plan(0, SHAPE, tuple(planned))
        self.stack, self.load, self.said = FakeStack(), FakeLoad(), []
        self.clients = Waiting()
        self.ledger = Ledger(self.plan.counts())
        around = Surroundings(self.stack, self.clients)
        self.conductor = Conductor(self.plan, around, self.load, self.ledger)

    async def carry_out(self, **options: object) -> None:
        options = {"quiet_every_s": 1e9, "stop": asyncio.Event()} | options
        async with asyncio.timeout(60):
            await self.conductor.run(say=self.said.append, **options)


async def test_faults_come_in_order_and_all_are_written_down(kinds, settled):
    run = Run(*[("instant", "decode-0")] * 20)
    await run.carry_out()
    assert kinds["instant"].fired == list(range(20))
    assert [fired.fault.number for fired in run.ledger.fired] == list(range(20))
    assert run.ledger.unfired == 0


async def test_one_that_ends_its_target_waits_for_the_others_and_tries_until_it_hits(
    kinds, settled
):
    run = Run(*[("alone", "decode-0")] * 3)
    await run.carry_out()
    assert kinds["alone"].fired == [0, 0, 1, 2]
    assert len(run.ledger.fired) == 3


async def test_what_finds_nothing_to_hit_is_given_up_and_named(kinds, settled, monkeypatch):
    monkeypatch.setattr(conductor, "STALL_S", 0.05)
    run = Run(("instant", "decode-0"), ("never", "decode-1"))
    await run.carry_out()
    assert run.ledger.missed == {"never": 1}
    assert run.ledger.unfired == 1
    assert "never" in run.said[-1]
    assert "decode-1" in run.said[-1]


async def test_a_fault_that_waits_gets_work_sent_its_way(kinds, settled, monkeypatch):
    monkeypatch.setattr(conductor, "NUDGE_AFTER_S", 0.01)
    stop = asyncio.Event()
    run = Run(("never", "prefill-1/router-0"), message="cancel")
    running = asyncio.create_task(run.carry_out(stop=stop))
    async with asyncio.timeout(60):
        while not (run.stack.paused and run.clients):
            await asyncio.sleep(0.001)
    stop.set()
    await running
    assert set(run.stack.paused) == {"prefill-0"}
    assert run.clients.take().order.leaves
    assert run.ledger.nudges > 0


async def test_quiet_points_are_written_down_with_what_they_found(kinds, settled):
    settled.append(Leak("decode-0", "blocks", 2))
    run = Run(("instant", "decode-0"))
    await run.carry_out(quiet_every_s=0.0, until_s=0.05)
    assert run.ledger.quiet_points > 0
    assert run.ledger.leaks[0] == settled[0]
    assert "1 faults" in run.said[0]


async def test_a_client_that_fails_by_itself_ends_the_run(kinds, settled):
    run = Run(("never", "decode-0"))
    run.load.broken = RuntimeError("a defect of the tool")
    with pytest.raises(RuntimeError, match="a defect of the tool"):
        await run.carry_out()


async def test_a_stop_leaves_no_task_behind(kinds, settled):
    run = Run(*[("never", "decode-0")] * 5)
    stop = asyncio.Event()
    running = asyncio.create_task(run.carry_out(stop=stop))
    await asyncio.sleep(0.02)
    stop.set()
    await running
    assert asyncio.all_tasks() == {asyncio.current_task()}
