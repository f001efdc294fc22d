"""The worker's end of the Join stream against a real gRPC server."""

import asyncio

import pytest

from kvrelay_engine.runtime import join
from kvrelay_engine.runtime.join import JoinLink
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import StartupError


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
