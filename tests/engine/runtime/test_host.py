"""A worker process's life around its worker: join, drain, leave, fail."""

import asyncio
from types import SimpleNamespace

import pytest

from kvrelay_engine.batch import Batch, SequenceSlice, StepResult
from kvrelay_engine.runtime import host as host_module
from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_engine.runtime.host import Advertisement, WorkerHost
from kvrelay_engine.runtime.startup import Phases
from kvrelay_engine.runtime.step_loop import LoadSnapshot
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import EngineFailed, StartupError

from .conftest import FakeRouter

NOTHING = LoadSnapshot(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
BATCH = Batch((SequenceSlice(1, (5,), 0, (0,), None),))
LAST_WORDS = 300
"""Of the last sequence: more than fit into one write."""


class Worker:
    """Has one open sequence from every submit until `finish`, which says its last word."""

    def __init__(self, host):
        self.host, self.open, self.dropped = host, 0, []
        self.sessions, self.pulses, self.unknown = [], [], ()
        """Whose each sequence is, oldest first."""
        self.changed = asyncio.Event()

    @property
    def open_sequences(self):
        return self.open

    async def wait_idle(self):
        while self.open:
            self.changed.clear()
            await self.changed.wait()

    def handle(self, message, session):
        self.open += 1
        self.sessions.append(session)

    def pulse(self, pulse, session):
        self.pulses.append((session, list(pulse.live)))
        return self.unknown

    def finish(self):
        session = self.sessions.pop(0)
        for _ in range(LAST_WORDS):
            self.host.send(pb.WorkerMessage(step_output=pb.StepOutput()), session)
        self._end(self.open - 1)

    def drop(self, session, reason):
        self.dropped.append(reason)
        self.sessions = [other for other in self.sessions if other != session]
        self._end(len(self.sessions))

    def drop_all(self, reason):
        self.dropped.append(reason)
        self._end(0)

    def _end(self, left):
        self.open = left
        self.changed.set()

    def events(self, events):
        pass

    def add_load(self, load):
        pass


class Scheduler:
    def __init__(self):
        self.work = []

    def schedule(self):
        return self.work.pop() if self.work else None

    def commit(self, batch, result):
        pass

    def take_events(self):
        return []

    def load(self):
        return NOTHING

    def check_integrity(self):
        pass


class Process:
    """One host on the test's loop."""

    def __init__(self, *routers, folder, step=lambda _: StepResult({}), grace_s=60.0):
        config = WorkerConfig(
            name="w",
            model_dir=folder,
            model_name="m",
            router=",".join(f"127.0.0.1:{router.port}" for router in routers),
            drain_grace_s=grace_s,
        )
        self.host = WorkerHost(config, SimpleNamespace(max_model_len=10), Phases())
        self.worker, self.scheduler = Worker(self.host), Scheduler()
        self.shutdown = asyncio.Event()
        advertisement = Advertisement(pb.ROLE_DECODE, pb.KvLayout(), "inproc", b"")
        self.task = asyncio.create_task(
            self.host.run(self.worker, advertisement, self.scheduler, step, self.shutdown)
        )

    async def ended(self):
        await asyncio.wait_for(self.task, 30)


def submit():
    return pb.RouterMessage(submit_decode=pb.SubmitDecode())


async def with_work(router, process, until):
    await until(lambda: router.sessions)
    router.sessions[-1].say(submit())
    await until(lambda: process.worker.open)


async def test_a_drain_says_so_finishes_what_runs_and_delivers_the_last_word(
    router, tmp_path, until
):
    process = Process(router, folder=tmp_path)
    await with_work(router, process, until)
    process.shutdown.set()
    await until(lambda: "drained" in router.sessions[0].kinds())
    assert not process.task.done()
    process.worker.finish()
    await process.ended()
    assert router.sessions[0].kinds() == ["hello", "drained", *["step_output"] * LAST_WORDS]
    assert len(router.sessions) == 1


async def test_the_routers_drain_message_is_a_shutdown(router, tmp_path, until):
    process = Process(router, folder=tmp_path)
    await until(lambda: router.sessions)
    router.sessions[-1].say(pb.RouterMessage(drain=pb.Drain()))
    await process.ended()


async def test_a_drain_ends_with_its_grace(router, tmp_path, until):
    process = Process(router, folder=tmp_path, grace_s=0.05)
    await with_work(router, process, until)
    process.shutdown.set()
    await process.ended()
    assert "worker stops" in process.worker.dropped


async def test_a_drain_without_a_router_ends(router, tmp_path, until):
    process = Process(router, folder=tmp_path)
    await with_work(router, process, until)
    await router.stop()
    process.shutdown.set()
    await process.ended()
    assert process.worker.open == 0


async def test_a_router_that_starts_during_a_drain_is_told_of_it(router, tmp_path, until):
    process = Process(router, folder=tmp_path)
    await with_work(router, process, until)
    process.worker.drop = lambda session, reason: None  # what runs belongs to another router
    process.shutdown.set()
    await until(lambda: "drained" in router.sessions[0].kinds())
    router.sessions[0].end()
    await until(lambda: len(router.sessions) == 2)
    await until(lambda: "drained" in router.sessions[1].kinds())
    process.worker.finish()
    await process.ended()


async def test_a_lost_router_drops_every_sequence_and_the_next_one_is_joined(
    router, tmp_path, until
):
    process = Process(router, folder=tmp_path)
    await with_work(router, process, until)
    router.sessions[0].end()
    await until(lambda: process.worker.dropped == ["the router is gone"])
    await until(lambda: len(router.sessions) == 2)
    await with_work(router, process, until)
    process.worker.finish()
    process.shutdown.set()
    await process.ended()


def _fail(_):
    raise ZeroDivisionError("a defect")


@pytest.mark.parametrize("draining", [False, True])
async def test_an_engine_that_fails_ends_the_process_with_its_reason(
    router, tmp_path, until, draining
):
    process = Process(router, folder=tmp_path, step=_fail)
    await with_work(router, process, until)
    if draining:
        process.shutdown.set()
        await until(lambda: "drained" in router.sessions[0].kinds())
    process.host.post(lambda: process.scheduler.work.append(BATCH))
    with pytest.raises(EngineFailed, match=r"engine loop failed.*a defect"):
        await process.ended()
    assert process.worker.open == 0


async def test_a_refused_worker_ends_with_the_routers_reason(router, tmp_path):
    error = pb.Error(code="layout_mismatch", message="block_size: 16 here, 32 there")
    router.answer = pb.RouterMessage(refused=pb.Refused(error=error))
    with pytest.raises(StartupError, match="block_size: 16 here, 32 there"):
        await Process(router, folder=tmp_path).ended()


# ---- several routers


@pytest.fixture
async def other():
    made = FakeRouter()
    await made.start()
    yield made
    await made.stop()


async def test_every_router_is_joined_and_told_of_a_drain(router, other, tmp_path, until):
    process = Process(router, other, folder=tmp_path)
    await with_work(router, process, until)
    other.sessions[-1].say(submit())
    await until(lambda: process.worker.open == 2)
    process.shutdown.set()
    for one in (router, other):
        await until(lambda one=one: "drained" in one.sessions[0].kinds())
    process.worker.finish()
    await until(lambda: router.sessions[0].kinds().count("step_output") == LAST_WORDS)
    assert not process.task.done()
    assert "step_output" not in other.sessions[0].kinds()
    process.worker.finish()
    await process.ended()
    assert other.sessions[0].kinds() == ["hello", "drained", *["step_output"] * LAST_WORDS]


async def test_a_lost_router_costs_the_others_nothing(router, other, tmp_path, until):
    process = Process(router, other, folder=tmp_path)
    await with_work(router, process, until)
    other.sessions[-1].say(submit())
    await until(lambda: process.worker.open == 2)
    mine, theirs = process.worker.sessions
    await other.stop()
    await until(lambda: process.worker.dropped)
    assert process.worker.sessions == [mine]
    await other.start()
    await until(lambda: len(other.sessions) == 2)
    # What is said for a session that is over reaches nobody, least of all the next one.
    process.host.send(pb.WorkerMessage(step_output=pb.StepOutput()), theirs)
    other.sessions[-1].say(submit())
    await until(lambda: process.worker.open == 2)
    process.worker.sessions.reverse()
    process.worker.finish()
    await until(lambda: other.sessions[1].kinds().count("step_output") == LAST_WORDS)
    assert len(router.sessions) == 1
    process.worker.finish()
    process.shutdown.set()
    await process.ended()
    assert other.sessions[1].kinds().count("step_output") == LAST_WORDS


async def test_a_router_that_is_not_there_keeps_nobody_from_the_others(
    router, other, tmp_path, until
):
    await other.stop()
    process = Process(other, router, folder=tmp_path)
    await with_work(router, process, until)
    process.worker.finish()
    process.shutdown.set()
    await process.ended()


async def test_one_router_that_refuses_is_no_end_and_is_asked_again(
    router, other, tmp_path, until, monkeypatch
):
    monkeypatch.setattr(host_module, "REFUSED_S", 0.01)
    welcome = other.answer
    other.answer = pb.RouterMessage(refused=pb.Refused(error=pb.Error(code="x", message="y")))
    process = Process(router, other, folder=tmp_path)
    await until(lambda: len(other.sessions) > 2)
    await with_work(router, process, until)
    other.answer = welcome
    await until(lambda: any(m.HasField("heartbeat") for m in other.sessions[-1].received))
    other.answer = router.answer = pb.RouterMessage(refused=other_refusal())
    for one in (router, other):
        one.sessions[-1].end()
    with pytest.raises(StartupError, match="refused"):
        await process.ended()


def other_refusal():
    return pb.Refused(error=pb.Error(code="invalid_api_key", message="join_token"))


async def test_a_pulse_reaches_the_worker_and_its_answer_the_next_heartbeat(
    router, other, tmp_path, until
):
    process = Process(router, other, folder=tmp_path)
    await until(lambda: router.sessions and other.sessions)
    process.worker.unknown = [7]
    router.sessions[0].live = [6, 7]
    await until(
        lambda: any(list(m.heartbeat.unknown) == [7] for m in router.sessions[0].received),
    )
    await until(lambda: any(live == [6, 7] for _, live in process.worker.pulses))
    by_session = dict(process.worker.pulses)
    assert len(by_session) == 2, "each router's pulse comes with its own session"
    process.shutdown.set()
    await process.ended()


async def test_a_load_says_what_was_noticed_of_the_streams(router, tmp_path, until):
    process = Process(router, folder=tmp_path)
    await until(lambda: router.sessions)
    router.change = lambda message: [message, message]
    await until(
        lambda: any(m.heartbeat.load.repeated_messages for m in router.sessions[0].received)
    )
    process.shutdown.set()
    await process.ended()
