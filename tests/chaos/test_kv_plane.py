"""The transport that follows orders, over real UCX between two transports of this process."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvrelay_chaos import kv_plane
from kvrelay_chaos.kv_plane import FaultyUcxTransport, KvOrder, KvPlane, flipped
from kvrelay_transfer.transport import create_transport, register_transport
from kvrelay_transfer.ucx import UcxTransport

TAG, OTHER_TAG = 11, 12
SHORT, LONG = b"short " * 8, bytes(range(256)) * 200


@pytest.fixture
def plane(monkeypatch) -> KvPlane:
    fresh = KvPlane()
    monkeypatch.setattr(kv_plane, "PLANE", fresh)
    return fresh


@pytest.fixture
async def pair(plane) -> AsyncIterator[tuple[FaultyUcxTransport, UcxTransport]]:
    sender, receiver = FaultyUcxTransport(), UcxTransport()
    await sender.start()
    await receiver.start()
    yield sender, receiver
    for transport in (sender, receiver):
        transport.check_integrity()
        await transport.abort()


async def _pass(pair, message: bytes, tag: int = TAG) -> bytes:
    sender, receiver = pair
    buffer = bytearray(2 * len(LONG))
    receive = receiver.receive(tag, buffer)
    sending = asyncio.create_task(sender.send(receiver.address, tag, bytearray(message)))
    nbytes = await receive.wait()
    await sending
    return bytes(buffer[:nbytes])


@pytest.mark.parametrize("message", [SHORT, LONG])
async def test_without_orders_messages_arrive_as_they_were_sent(pair, message):
    assert await _pass(pair, message) == message


@pytest.mark.parametrize("message", [SHORT, LONG])
@pytest.mark.parametrize("at", [0.0, 0.5, 0.99999, 1.0])
async def test_a_flipped_bit_is_one_bit_and_the_next_message_is_whole(pair, plane, message, at):
    hit = plane.orders.arm(KvOrder("corrupt", at=at)).hit
    damaged = await _pass(pair, message)
    different = [(a ^ b).bit_count() for a, b in zip(damaged, message, strict=True) if a != b]
    assert different == [1]
    assert hit.done()
    assert await _pass(pair, message) == message


@pytest.mark.parametrize(("at", "left"), [(0.0, 0), (0.25, len(LONG) // 4), (0.5, len(LONG) // 2)])
async def test_a_truncated_message_is_its_first_part(pair, plane, at, left):
    plane.orders.arm(KvOrder("truncate", at=at))
    assert await _pass(pair, LONG) == LONG[:left]


async def test_a_dropped_message_counts_as_sent_and_never_arrives(pair, plane):
    sender, receiver = pair
    plane.orders.arm(KvOrder("drop"))
    receive = receiver.receive(TAG, bytearray(len(LONG)))
    await sender.send(receiver.address, TAG, bytearray(LONG))
    await sender.send(receiver.address, TAG, bytearray(SHORT))
    assert await receive.wait() == len(SHORT)


@pytest.mark.parametrize("message", [SHORT, LONG])
async def test_a_repeated_message_arrives_twice(pair, plane, message):
    sender, receiver = pair
    plane.orders.arm(KvOrder("duplicate"))
    buffers = [bytearray(len(LONG)) for _ in range(2)]
    receives = [receiver.receive(TAG, buffer) for buffer in buffers]
    await sender.send(receiver.address, TAG, bytearray(message))
    for receive, buffer in zip(receives, buffers, strict=True):
        assert bytes(buffer[: await receive.wait()]) == message


async def test_a_repetition_that_nobody_wants_is_nothing_to_the_sender(pair, plane):
    sender, receiver = pair
    plane.orders.arm(KvOrder("duplicate"))
    sending = asyncio.create_task(sender.send(receiver.address, TAG, bytearray(LONG)))
    await receiver.receive(TAG, bytearray(len(LONG))).wait()
    receiver.end(TAG)
    await sending


async def test_a_foreign_message_is_one_of_another_transfer(pair, plane):
    hit = plane.orders.arm(KvOrder("foreign")).hit
    assert await _pass(pair, LONG, TAG) == LONG
    assert await _pass(pair, LONG[:-1], TAG) == LONG[:-1], "only another transfer's will do"
    assert not hit.done()
    assert await _pass(pair, SHORT, OTHER_TAG) == LONG
    assert hit.done()
    assert await _pass(pair, SHORT, OTHER_TAG) == SHORT


@pytest.mark.parametrize(
    "order", [KvOrder("delay", seconds=0.01), KvOrder("slow_link", seconds=0.01, bytes_per_s=1e8)]
)
async def test_a_late_message_is_whole(pair, plane, order):
    hit = plane.orders.arm(order).hit
    assert await _pass(pair, LONG) == LONG
    assert hit.done()


async def test_a_send_cancelled_on_a_slow_link_leaves_the_order_to_the_next_one(pair, plane):
    sender, receiver = pair
    plane.orders.arm(KvOrder("slow_link", seconds=60.0, bytes_per_s=1.0))
    hit = plane.orders.arm(KvOrder("corrupt", at=0.5)).hit
    for _ in range(2):  # the first one makes the link slow
        sending = asyncio.create_task(sender.send(receiver.address, TAG, bytearray(LONG)))
        await asyncio.sleep(0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
    assert not hit.done()
    plane.slow_until = 0.0
    assert await _pass(pair, LONG) != LONG
    assert hit.done()


async def test_orders_are_taken_one_a_message(pair, plane):
    armed = [plane.orders.arm(KvOrder("corrupt", at=0.3)) for _ in range(2)]
    assert await _pass(pair, LONG) != LONG
    assert [one.hit.done() for one in armed] == [True, False]


def test_the_transport_takes_the_place_of_ucx_by_its_name(monkeypatch):
    import kvrelay_transfer.transport

    monkeypatch.setattr(
        kvrelay_transfer.transport, "_SCHEMES", dict(kvrelay_transfer.transport._SCHEMES)
    )
    register_transport("ucx", "kvrelay_chaos.kv_plane", "FaultyUcxTransport")
    made = create_transport("ucx://")
    assert isinstance(made, FaultyUcxTransport)
    assert made.scheme == "ucx"


@pytest.mark.parametrize(("at", "byte", "bit"), [(0.0, 0, 0), (0.5, 2, 0), (1.0, 3, 7)])
def test_the_bit_is_where_the_fraction_says(at, byte, bit):
    assert flipped(memoryview(bytes(4)), at)[byte] == 1 << bit
