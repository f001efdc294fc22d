"""The proxy between a real gRPC server and a real client, which count the messages that reach them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from kvrelay_chaos.proxy import JoinProxy, MessageOrder, kinds_of
from kvrelay_infra.host import free_port
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc as rpc


def _beat(number: int) -> pb.WorkerMessage:
    return pb.WorkerMessage(heartbeat=pb.Heartbeat(), number=number)


def _granted(number: int) -> pb.WorkerMessage:
    return pb.WorkerMessage(lease_granted=pb.LeaseGranted(sequence_id=number), number=number)


class Router(rpc.FleetServicer):
    """Welcomes, notes the number of everything it reads, and says it back as a cancel."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.ends = 0

    async def Join(self, requests, context) -> AsyncIterator[pb.RouterMessage]:
        try:
            async for message in requests:
                self.read.append(message.number)
                said = {"cancel": pb.Cancel(sequence_id=message.number)}
                if message.WhichOneof("message") == "hello":
                    said = {"welcome": pb.Welcome()}
                yield pb.RouterMessage(**said, number=message.number)
        finally:
            self.ends += 1


class Worker:
    """One call of `Join`, a message at a time."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self.call = rpc.FleetStub(self._channel).Join()

    async def join(self) -> None:
        await self.call.write(pb.WorkerMessage(hello=pb.Hello(worker_name="w")))
        assert (await self.call.read()).WhichOneof("message") == "welcome"

    async def say(self, *messages: pb.WorkerMessage) -> None:
        for message in messages:
            await self.call.write(message)

    async def hear(self, count: int) -> list[int]:
        """Numbers of the next messages."""
        return [(await self.call.read()).number for _ in range(count)]

    async def close(self) -> None:
        self.call.cancel()
        await self._channel.close()


@pytest.fixture
async def joined() -> AsyncIterator[tuple[JoinProxy, Router, Worker]]:
    router, server, port = Router(), grpc.aio.server(), free_port("127.0.0.1")
    rpc.add_FleetServicer_to_server(router, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    proxy = JoinProxy(f"127.0.0.1:{port}")
    await proxy.start()
    worker = Worker(proxy.address)
    try:
        await worker.join()
        yield proxy, router, worker
    finally:
        await worker.close()
        await proxy.stop()
        await server.stop(None)


async def test_without_orders_everything_passes_unchanged(joined):
    proxy, router, worker = joined
    assert proxy.connected
    await worker.say(*map(_beat, range(1, 6)))
    assert await worker.hear(5) == [1, 2, 3, 4, 5]
    assert router.read == [0, 1, 2, 3, 4, 5]
    assert proxy.lanes["up"].messages == proxy.lanes["down"].messages == 6


@pytest.mark.parametrize(
    ("fault", "arrives"),
    [("drop", [2, 3]), ("duplicate", [1, 1, 2, 3]), ("reorder", [2, 1, 3]), ("delay", [1, 2, 3])],
)
@pytest.mark.parametrize("direction", ["up", "down"])
async def test_an_order_changes_one_message(joined, direction, fault, arrives):
    proxy, router, worker = joined
    order = MessageOrder(fault, seconds=0.01)
    hit = proxy.lanes[direction].orders.arm(order).hit
    await worker.say(_beat(1), _beat(2), _beat(3))
    assert await worker.hear(len(arrives)) == arrives
    assert router.read[1:] == (arrives if direction == "up" else [1, 2, 3])
    assert hit.done()
    assert len(proxy.lanes[direction].orders) == 0


async def test_an_order_waits_for_a_message_of_its_kind_also_within_a_batch(joined):
    proxy, _, worker = joined
    orders = proxy.lanes["up"].orders
    first = orders.arm(MessageOrder("drop", "lease_granted"))
    second = orders.arm(MessageOrder("duplicate", "kv_received"))
    batch = pb.WorkerMessage(batch=pb.WorkerBatch(messages=[_beat(0), _granted(0)]), number=2)
    await worker.say(_beat(1), batch, _beat(3))
    assert await worker.hear(2) == [1, 3]
    assert first.hit.done()
    assert not second.hit.done()


async def test_two_orders_for_reordering_change_places_once_and_both_count(joined):
    proxy, _, worker = joined
    armed = [proxy.lanes["up"].orders.arm(MessageOrder("reorder")) for _ in range(2)]
    await worker.say(_beat(1), _beat(2), _beat(3))
    assert await worker.hear(3) == [2, 1, 3]
    assert all(one.hit.done() for one in armed)


async def test_a_cut_ends_the_stream_on_both_sides(joined):
    proxy, router, worker = joined
    assert proxy.cut()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.hear(1)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await _until(lambda: router.ends == 1 and not proxy.connected)
    assert not proxy.cut(), "there is nothing left to cut"


async def test_orders_wait_for_the_next_stream(joined):
    proxy, _, _ = joined
    proxy.cut()
    await _until(lambda: not proxy.connected)
    hit = proxy.lanes["up"].orders.arm(MessageOrder("drop", "lease_granted")).hit
    again = Worker(proxy.address)
    try:
        await again.join()
        await again.say(_granted(1), _beat(2))
        assert await again.hear(1) == [2]
        assert hit.done()
    finally:
        await again.close()


async def test_a_frozen_stream_loses_nothing(joined):
    proxy, router, worker = joined
    frozen = asyncio.create_task(proxy.freeze(0.2))
    await _until(lambda: not proxy.lanes["up"].open.is_set())
    await worker.say(_beat(1), _beat(2))
    assert await worker.hear(2) == [1, 2]
    assert await frozen
    assert router.read == [0, 1, 2]


async def test_a_worker_that_dials_while_the_router_is_gone_is_told(joined):
    proxy = JoinProxy(f"127.0.0.1:{free_port('127.0.0.1')}")
    await proxy.start()
    worker = Worker(proxy.address)
    try:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.join()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not proxy.connected
    finally:
        await worker.close()
        await proxy.stop()


async def test_a_cancelled_wait_disarms_its_order(joined):
    proxy, _, _ = joined
    orders = proxy.lanes["down"].orders
    waiting = asyncio.create_task(orders.until_hit(MessageOrder("drop")))
    await _until(lambda: len(orders) == 1)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert len(orders) == 0


def test_kinds_are_those_of_the_messages_in_a_batch():
    batch = pb.WorkerBatch(messages=[_beat(0), _granted(0)])
    assert kinds_of(pb.WorkerMessage(batch=batch)) == ["heartbeat", "lease_granted"]
    assert kinds_of(pb.RouterMessage(cancel=pb.Cancel())) == ["cancel"]
    assert kinds_of(pb.RouterMessage()) == []


async def _until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
