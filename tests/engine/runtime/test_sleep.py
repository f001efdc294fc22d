"""A worker that is told to sleep: when it does, when it does not, and that no work is ever lost to it."""

import asyncio

import pytest

from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_engine.runtime.host import Advertisement, WorkerHost
from kvrelay_engine.runtime.startup import Phases
from kvrelay_engine.runtime.step_loop import LoadSnapshot
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import EngineFailed

from .conftest import FakeRouter

SLEEP, WAKE = "sleep", "wake"


class Engine:
    """Writes down what it is told, and can be held up. `allocator` and `runner` at once."""

    def __init__(self):
        self.log, self.defect = [], None
        self.allocator = self.runner = self
        self.max_model_len = 10

    def clear(self):
        self.log.append("clear")

    def sleep(self):
        if self.defect:
            raise self.defect
        self.log.append(SLEEP)

    def wake(self):
        if self.defect:
            raise self.defect
        self.log.append(WAKE)


class Scheduler:
    """Has as many sequences as are set."""

    def __init__(self):
        self.running = 0

    def schedule(self):
        return None

    def commit(self, batch, result):
        pass

    def take_events(self):
        return []

    def load(self):
        return LoadSnapshot(self.running, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)

    def check_integrity(self):
        pass


class Worker:
    """Each submit is a sequence for the engine thread, and open until `finish`."""

    def __init__(self, host, engine):
        self.host, self.engine, self.open_sequences = host, engine, 0

    async def wait_idle(self):
        while self.open_sequences:
            await asyncio.sleep(0.001)

    def handle(self, message, session):
        self.open_sequences += 1
        self.host.post(lambda: self.engine.log.append("work"))

    def finish(self):
        self.open_sequences = 0

    def pulse(self, pulse, session):
        return []

    def events(self, events):
        pass

    def drop(self, session, reason):
        self.finish()

    def drop_all(self, reason):
        self.finish()

    def add_load(self, load):
        pass


class Process:
    def __init__(self, *routers, folder):
        config = WorkerConfig(
            name="w",
            model_dir=folder,
            model_name="m",
            router=",".join(f"127.0.0.1:{router.port}" for router in routers),
        )
        self.engine, self.scheduler = Engine(), Scheduler()
        self.host = WorkerHost(config, self.engine, Phases())
        self.worker = Worker(self.host, self.engine)
        self.shutdown = asyncio.Event()
        advertisement = Advertisement(pb.ROLE_DECODE, pb.KvLayout(), "inproc", b"")
        self.task = asyncio.create_task(
            self.host.run(self.worker, advertisement, self.scheduler, _no_step, self.shutdown)
        )


def _no_step(_batch):
    raise AssertionError("nothing is ever scheduled")


@pytest.fixture
async def process(router, tmp_path, until):
    made = Process(router, folder=tmp_path)
    await until(lambda: router.sessions and heard(router, "heartbeat"))
    yield made
    made.worker.finish()
    made.shutdown.set()
    await asyncio.gather(made.task, return_exceptions=True)


def heard(router, kind, session=-1):
    return [m for m in router.sessions[session].received if m.WhichOneof("message") == kind]


def states(router, session=-1):
    """(asleep, order) of each answer."""
    found = [m.sleep_state for m in heard(router, "sleep_state", session)]
    return [(state.asleep, state.order) for state in found]


def order(kind, number):
    if kind == SLEEP:
        return pb.RouterMessage(sleep=pb.Sleep(order=number))
    return pb.RouterMessage(wake=pb.Wake(order=number))


def submit():
    return pb.RouterMessage(submit_decode=pb.SubmitDecode())


async def test_it_sleeps_and_wakes_and_says_so(router, process, until):
    router.sessions[0].say(order(SLEEP, 1))
    await until(lambda: states(router) == [(True, 1)])
    assert process.engine.log == ["clear", SLEEP]
    router.sessions[0].say(order(WAKE, 2))
    await until(lambda: states(router) == [(True, 1), (False, 2)])
    assert process.engine.log == ["clear", SLEEP, WAKE]


async def test_the_same_order_twice_is_carried_out_once_and_answered_twice(router, process, until):
    for number in (1, 2):
        router.sessions[0].say(order(SLEEP, number))
        await until(lambda number=number: states(router)[-1:] == [(True, number)])
    assert process.engine.log == ["clear", SLEEP]


async def test_with_work_under_way_it_stays_awake_and_says_so(router, process, until):
    router.sessions[0].say(submit())
    router.sessions[0].say(order(SLEEP, 1))
    await until(lambda: states(router) == [(False, 1)])
    assert process.engine.log == ["work"]
    process.worker.finish()
    router.sessions[0].say(order(SLEEP, 2))
    await until(lambda: states(router)[-1] == (True, 2))


async def test_what_only_the_engine_still_has_keeps_it_awake_too(router, process, until):
    process.scheduler.running = 1
    router.sessions[0].say(order(SLEEP, 1))
    await until(lambda: states(router) == [(False, 1)])
    assert process.engine.log == []
    process.scheduler.running = 0
    router.sessions[0].say(order(SLEEP, 2))
    await until(lambda: states(router)[-1] == (True, 2))


async def test_work_in_the_same_instant_as_the_order_finds_it_awake(router, process, until):
    router.sessions[0].say(order(SLEEP, 1))
    router.sessions[0].say(submit())
    await until(lambda: "work" in process.engine.log)
    assert process.engine.log == ["clear", SLEEP, WAKE, "work"]
    await until(lambda: states(router) == [(False, 1)])


async def test_work_wakes_it_without_an_order(router, process, until):
    router.sessions[0].say(order(SLEEP, 1))
    await until(lambda: states(router) == [(True, 1)])
    router.sessions[0].say(submit())
    await until(lambda: states(router) == [(True, 1), (False, 1)])
    assert process.engine.log == ["clear", SLEEP, WAKE, "work"]


async def test_a_wake_behind_a_sleep_leaves_it_awake_and_only_the_last_is_answered(
    router, process, until
):
    router.sessions[0].say(order(SLEEP, 1))
    router.sessions[0].say(order(WAKE, 2))
    await until(lambda: states(router)[-1:] == [(False, 2)])
    assert (True, 2) not in states(router)
    assert process.engine.log in ([], ["clear", SLEEP, WAKE])


async def test_it_rejoins_asleep(router, process, until):
    router.sessions[0].say(order(SLEEP, 1))
    await until(lambda: states(router) == [(True, 1)])
    await router.stop()
    await router.start()
    await until(lambda: len(router.sessions) == 2 and states(router, 1))
    assert heard(router, "hello", 1)[0].hello.asleep
    assert states(router, 1) == [(True, 0)]
    router.sessions[1].say(order(WAKE, 1))
    await until(lambda: states(router, 1)[-1] == (False, 1))


async def test_every_router_hears_of_it(router, tmp_path, until):
    other = FakeRouter()
    await other.start()
    process = Process(router, other, folder=tmp_path)
    await until(lambda: router.sessions and other.sessions and heard(other, "heartbeat"))
    router.sessions[0].say(order(SLEEP, 1))
    await until(lambda: states(other) == [(True, 0)])
    other.sessions[0].say(submit())
    await until(lambda: states(router)[-1] == (False, 1))
    process.worker.finish()
    process.shutdown.set()
    await asyncio.wait_for(process.task, 30)
    await other.stop()


async def test_a_shutdown_while_it_sleeps_ends_it(router, process, until):
    router.sessions[0].say(order(SLEEP, 1))
    await until(lambda: states(router) == [(True, 1)])
    process.shutdown.set()
    await asyncio.wait_for(process.task, 30)
    assert heard(router, "drained")
    assert WAKE not in process.engine.log


async def test_without_memory_for_the_weights_it_stays_awake(router, process, until, caplog):
    process.engine.defect = RuntimeError("no host memory")
    router.sessions[0].say(order(SLEEP, 1))
    await until(lambda: states(router) == [(False, 1)])
    assert "can't sleep: no host memory" in caplog.text
    assert not process.task.done()


async def test_a_device_that_somebody_else_has_filled_ends_the_process(router, process, until):
    router.sessions[0].say(order(SLEEP, 1))
    await until(lambda: states(router) == [(True, 1)])
    process.engine.defect = MemoryError("the device is full")
    router.sessions[0].say(order(WAKE, 2))
    with pytest.raises(EngineFailed, match="the device is full"):
        await asyncio.wait_for(process.task, 30)
