"""The worker's end of the Join stream against a real gRPC server."""

import asyncio

import pytest

from kvrelay_engine.runtime import join
from kvrelay_engine.runtime.join import JoinLink
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import StartupError

from .conftest import WELCOME


class Handler:
    """Writes down what the link tells it."""

    def __init__(self):
        self.told, self.sessions = [], []

    def hello(self):
        return pb.Hello(worker_name="w")

    def heartbeat(self, session):
        return pb.Heartbeat(load=pb.Load(running=3))

    def handle(self, message, session):
        if not message.HasField("pulse"):
            self.told.append(message.WhichOneof("message"))
            self.sessions.append(session)

    def disconnected(self, session):
        self.told.append("disconnected")


@pytest.fixture
async def link(router):
    made = JoinLink(f"127.0.0.1:{router.port}", Handler(), heartbeat_s=60.0)
    made.handler = made._handler
    made.task = asyncio.create_task(made.run(lambda: made.handler.told.append("joined")))
    yield made
    made.task.cancel()
    await asyncio.gather(made.task, return_exceptions=True)


def cancel(number):
    return pb.RouterMessage(cancel=pb.Cancel(sequence_id=number))


def failure(number):
    return pb.WorkerMessage(sequence_failed=pb.SequenceFailed(sequence_id=number))


def numbers(session):
    kind = "sequence_failed"
    return [m.sequence_failed.sequence_id for m in session.received if m.HasField(kind)]


async def test_hello_comes_first_then_what_is_sent_in_order(router, link, until):
    await link.joined.wait()
    for number in range(100):
        link.send(failure(number))
    await until(lambda: len(numbers(router.sessions[0])) == 100)
    assert router.sessions[0].kinds()[0] == "hello"
    assert numbers(router.sessions[0]) == list(range(100))


async def test_heartbeats_come_as_often_as_the_router_asked(router, link, until):
    await until(lambda: router.sessions and len(router.sessions[0].received) > 3)
    assert router.sessions[0].received[-1].heartbeat.load.running == 3


async def test_a_broken_stream_is_told_once_and_joined_again(router, link, until):
    for _ in range(3):
        await until(lambda: link.handler.told[-1:] == ["joined"])
        router.sessions[-1].end()
        await until(lambda: link.handler.told[-1:] == ["disconnected"])
    await until(lambda: link.handler.told[-1:] == ["joined"])
    assert link.handler.told == ["joined", "disconnected"] * 3 + ["joined"]


async def test_a_router_that_restarts_is_found_again_and_gets_nothing_old(router, link, until):
    await link.joined.wait()
    await router.stop()
    await until(lambda: "disconnected" in link.handler.told)
    link.send(failure(1))  # of a sequence the lost router owned
    await router.start()
    await until(lambda: link.handler.told[-1] == "joined")
    link.send(failure(2))
    await until(lambda: numbers(router.sessions[-1]))
    assert numbers(router.sessions[-1]) == [2]


async def test_a_router_that_is_back_is_found_by_the_next_try(router, link, until):
    await link.joined.wait()
    await router.stop()
    gone_at = link.session
    await until(lambda: link.session > gone_at + 6)  # failures enough for gRPC to hesitate
    await router.start()
    back_at = link.session
    await until(link.joined.is_set)
    assert link.session <= back_at + 1  # the one under way may have come too early


async def test_dialling_in_vain_leaves_no_task_behind(router, link, until, monkeypatch):
    await link.joined.wait()
    monkeypatch.setattr(join, "REDIAL_S", 0.01)
    await router.stop()
    gone_at = link.session
    await until(lambda: link.session > gone_at + 2)
    tasks = len(asyncio.all_tasks())
    await until(lambda: link.session > gone_at + 32)
    assert len(asyncio.all_tasks()) < tasks + 15  # a session in progress has some


async def test_a_refusal_ends_the_link_with_the_routers_reason(router):
    error = pb.Error(code="layout_mismatch", message="dtype: 'a' here, 'b' there")
    router.answer = pb.RouterMessage(refused=pb.Refused(error=error))
    link = JoinLink(f"127.0.0.1:{router.port}", Handler(), heartbeat_s=60.0)
    with pytest.raises(StartupError, match="refused: dtype: 'a' here, 'b' there"):
        await asyncio.wait_for(link.run(lambda: None), 20)


async def test_leaving_says_everything_first_and_does_not_dial_again(router, link, until):
    await link.joined.wait()
    for number in range(1000):
        link.send(failure(number))
    link.leave()
    link.send(failure(-1 % 2**64))
    await asyncio.wait_for(link.task, 20)
    assert numbers(router.sessions[0]) == list(range(1000))
    assert len(router.sessions) == 1


async def test_leaving_without_a_router_ends_at_once(router, link, until):
    await link.joined.wait()
    await router.stop()
    await until(lambda: "disconnected" in link.handler.told)
    link.leave()
    await asyncio.wait_for(link.task, 20)


@pytest.fixture
def short_queue(monkeypatch):
    """For links made after it."""
    monkeypatch.setattr(join, "MAX_QUEUED", 100)


async def test_a_router_that_does_not_read_is_lost_not_waited_for(router, short_queue, link, until):
    router.deaf = True
    await link.joined.wait()
    big = pb.WorkerMessage(kv_missing=pb.KvMissing(messages=range(100_000)))
    for _ in range(300):
        link.send(big)
        await asyncio.sleep(0)
    await until(lambda: "disconnected" in link.handler.told)
    router.deaf = False
    await until(lambda: link.handler.told[-1] == "joined")


async def test_a_cancel_ends_the_link_in_any_state(router):
    for moment in range(12):
        link = JoinLink(f"127.0.0.1:{router.port}", Handler(), heartbeat_s=0.0001)
        task = asyncio.create_task(link.run(lambda: None))
        for _ in range(moment):
            await asyncio.sleep(0.0005 * moment)
        if router.sessions and moment % 3 == 2:
            router.sessions[-1].end()
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 20)
        assert task.cancelled()


@pytest.fixture
def no_heartbeats(router):
    """For links made after it: every numbered message is a test's own."""
    welcome = pb.Welcome(router_id="r", heartbeat_seconds=60.0)
    router.answer = pb.RouterMessage(welcome=welcome)


def changed(fault):
    """Applies `fault` to the second message of a session's numbered ones; the rest passes."""
    later = []

    def change(message):
        if message.number == 2:
            return fault(message, later)
        return [message, *(later.pop() for _ in later[:])]

    return change


def dropped(message, later):
    return []


def reordered(message, later):
    later.append(message)
    return []


@pytest.mark.parametrize("fault", [dropped, reordered])
async def test_a_message_that_is_missing_ends_the_session_and_a_new_one_is_whole(
    router, no_heartbeats, link, until, fault
):
    await link.joined.wait()
    router.change = changed(fault)
    session = router.sessions[0]
    for number in (1, 2):
        session.say(cancel(number))
        await until(lambda: not len(session.said))  # so that each is written alone
    session.say(cancel(3))
    await until(lambda: "disconnected" in link.handler.told)
    router.change = lambda message: [message]
    await until(lambda: link.handler.told[-1] == "joined")
    assert link.handler.told == ["joined", "cancel", "disconnected", "joined"]
    assert (link.faults.missing, link.faults.repeated) == (1, 0)
    router.sessions[-1].say(cancel(1))
    await until(lambda: link.handler.told[-1] == "cancel")
    assert link.handler.sessions == [0, 1]


async def test_a_message_that_comes_twice_is_obeyed_once_and_counted(
    router, no_heartbeats, link, until
):
    await link.joined.wait()
    router.change = changed(lambda message, _: [message, message])
    session = router.sessions[0]
    for number in range(1, 4):
        session.say(cancel(number))
        await until(lambda n=number: link.handler.told.count("cancel") == n)
    assert link.handler.told == ["joined", *["cancel"] * 3]
    assert (link.faults.missing, link.faults.repeated) == (0, 1)


async def test_a_router_that_says_nothing_is_given_up_though_its_connection_stands(
    router, link, until, monkeypatch
):
    monkeypatch.setattr(join, "MIN_SILENCE_S", 1.5)
    await link.joined.wait()
    router.change = lambda message: []
    await until(lambda: link.faults.silent)
    await until(lambda: "disconnected" in link.handler.told)
    router.change = lambda message: [message]
    await until(lambda: link.handler.told[-1] == "joined")


async def test_a_router_that_never_answers_the_hello_is_dialled_again(router, until, monkeypatch):
    monkeypatch.setattr(join, "MIN_SILENCE_S", 1.5)
    router.answer = None
    link = JoinLink(f"127.0.0.1:{router.port}", Handler(), heartbeat_s=0.01)
    task = asyncio.create_task(link.run(lambda: None))
    await until(lambda: len(router.sessions) > 1)
    router.answer = WELCOME
    await until(link.joined.is_set)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_silence_starts_at_three_seconds_and_at_three_pulses():
    assert JoinLink("r:1", Handler(), heartbeat_s=0.5).silence_limit_s == 3.0
    assert JoinLink("r:1", Handler(), heartbeat_s=2.0).silence_limit_s == 6.0


async def test_a_worker_that_slept_does_not_blame_its_router(router, link, until, monkeypatch):
    await link.joined.wait()
    loop = asyncio.get_running_loop()
    slept = 0.0
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + slept, raising=False)
    for _ in range(3):
        pulses = len(router.sessions[0].received)
        slept += 60.0  # as a stopped process finds its clock
        await until(lambda n=pulses: len(router.sessions[0].received) > n)
    assert link.faults.silent == 0
    assert link.handler.told == ["joined"]


async def test_a_first_message_that_is_no_answer_to_the_hello_ends_the_session(
    router, until, caplog
):
    router.answer = cancel(1)
    handler = Handler()
    link = JoinLink(f"127.0.0.1:{router.port}", handler, heartbeat_s=0.01)
    task = asyncio.create_task(link.run(lambda: None))
    await until(lambda: len(router.sessions) > 2)
    assert handler.told == []
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
