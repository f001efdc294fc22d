"""A router of a few lines behind a real gRPC server, and a worker of a few lines before it."""

import asyncio
import contextlib

import grpc
import pytest

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc as rpc
from kvrelay_protocol.incoming import Incoming
from kvrelay_protocol.outgoing import Outgoing

WELCOME = pb.RouterMessage(welcome=pb.Welcome(router_id="r", heartbeat_seconds=0.01))
PINGS_ALLOWED = [
    ("grpc.http2.min_ping_interval_without_data_ms", 300),
    ("grpc.http2.max_ping_strikes", 0),
]


class Session:
    """One Join call: what came, and a line of what to say."""

    def __init__(self):
        self.received, self.said = [], Outgoing(pb.RouterMessage, 1 << 16)
        self.live = []
        """What its pulses name."""
        self.ended = asyncio.Event()

    def say(self, message):
        self.said.put(message)

    def end(self):
        """Close the stream, once everything is said."""
        self.said.close()

    def take(self, message):
        self.received.append(message)
        if message.HasField("heartbeat"):
            self.say(pb.RouterMessage(pulse=pb.Pulse(live=self.live)))

    def kinds(self):
        kinds = [m.WhichOneof("message") for m in self.received]
        return [kind for kind in kinds if kind != "heartbeat"]


class FakeRouter(rpc.FleetServicer):
    """Answers every hello with `answer`; reads nothing more where `deaf` is set.

    What it writes goes through `change`: a message in, those that are written instead out.
    """

    def __init__(self):
        self.sessions, self.answer, self.deaf = [], WELCOME, False
        self.change = lambda message: [message]
        self.server, self.port = None, 0

    async def start(self):
        self.server = grpc.aio.server(options=PINGS_ALLOWED)
        rpc.add_FleetServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    async def stop(self):
        if self.server is not None:
            await self.server.stop(0)
        self.server = None

    async def Join(self, requests, context):
        session = Session()
        self.sessions.append(session)

        async def read():
            incoming = Incoming()
            async for message in requests:
                if message.HasField("hello"):
                    session.received.append(message)
                else:
                    assert incoming.take(message, session.take)
                if self.deaf:
                    await asyncio.Event().wait()
            session.end()

        reader = asyncio.create_task(read())
        try:
            if self.answer is not None:
                await context.write(self.answer)
            while (message := await session.said.next()) is not None:
                for written in self.change(message):
                    await context.write(written)
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            session.ended.set()


@pytest.fixture
async def router():
    made = FakeRouter()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def until():
    """Wait for a fact."""

    async def wait(condition):
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)

    return wait
