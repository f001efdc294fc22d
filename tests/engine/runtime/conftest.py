"""A router of a few lines behind a real gRPC server, and a worker of a few lines before it."""

import asyncio
import contextlib

import grpc
import pytest

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc as rpc
from kvrelay_protocol.outgoing import each

WELCOME = pb.RouterMessage(welcome=pb.Welcome(router_id="r", heartbeat_seconds=0.01))
PINGS_ALLOWED = [
    ("grpc.http2.min_ping_interval_without_data_ms", 300),
    ("grpc.http2.max_ping_strikes", 0),
]


class Session:
    """One Join call: what came, and a line of what to say. None ends the call."""

    def __init__(self):
        self.received, self.say = [], asyncio.Queue()
        self.ended = asyncio.Event()

    def kinds(self):
        kinds = [m.WhichOneof("message") for m in self.received]
        return [kind for kind in kinds if kind != "heartbeat"]


class FakeRouter(rpc.FleetServicer):
    """Answers every hello with `answer`; reads nothing more where `deaf` is set."""

    def __init__(self):
        self.sessions, self.answer, self.deaf = [], WELCOME, False
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
            async for message in requests:
                each(message, session.received.append)
                if self.deaf:
                    await asyncio.Event().wait()
            session.say.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            await context.write(self.answer)
            while (message := await session.say.get()) is not None:
                await context.write(message)
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
