"""A session that ended has let go of its connection, and not only once the garbage is collected."""

import asyncio
import gc

import psutil
import pytest

from kvrelay_engine.runtime.join import JoinLink
from kvrelay_protocol import fleet_pb2 as pb

SESSIONS = 8


class _Handler:
    def hello(self):
        return pb.Hello(worker_name="w")

    def heartbeat(self, session):
        return pb.Heartbeat()

    def handle(self, message, session):
        pass

    def disconnected(self, session):
        pass


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _connections(port: int) -> int:
    found = psutil.Process().net_connections("tcp")
    return sum(c.status == "ESTABLISHED" and c.raddr and c.raddr.port == port for c in found)


async def test_sessions_that_end_in_an_error_keep_no_connection(router, until, no_collector):
    link = JoinLink(f"127.0.0.1:{router.port}", _Handler(), heartbeat_s=60.0)
    task = asyncio.create_task(link.run(lambda: None))
    try:
        for number in range(SESSIONS):
            await until(lambda number=number: link.joined.is_set() and link.session == number)
            # A number that can't be: the worker ends the session.
            router.sessions[-1].say(pb.RouterMessage(cancel=pb.Cancel(), number=9))
            router.change = lambda message: [pb.RouterMessage(pulse=pb.Pulse(), number=99), message]
            await until(lambda number=number: link.session > number)
            router.change = lambda message: [message]
        await until(lambda: link.joined.is_set() and _connections(router.port) == 1)
        assert link.faults.missing == SESSIONS
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
