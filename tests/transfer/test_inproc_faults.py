"""The faults a test can order, and that a frame's digest sees them."""

import asyncio
import time

import pytest

from kvrelay_protocol.errors import CorruptFrame, PeerLost
from kvrelay_transfer.frames import HEADER_SIZE, Expected, FrameHeader, FrameKind, open_frame, seal
from kvrelay_transfer.inproc import Fault, Faults, InprocTransport

SIZES = [1000, 3_000_000]
OURS = Expected(bytes(16), 1, 1, bytes(32))


def frame(payload_bytes: int) -> bytearray:
    buffer = bytearray(HEADER_SIZE) + b"k" * payload_bytes
    seal(buffer, FrameHeader(FrameKind.KV_GROUP, bytes(16), 1, 1, 0), payload_bytes, OURS.key)
    return buffer


@pytest.fixture
async def faulty():
    started = []

    async def make(*plan: Fault) -> tuple[InprocTransport, InprocTransport, Faults]:
        faults = Faults(list(plan))
        a, b = InprocTransport(faults=faults), InprocTransport()
        for transport in (a, b):
            await transport.start()
            started.append(transport)
        return a, b, faults

    yield make
    for transport in started:
        transport.check_integrity()
        await transport.abort()


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("kind", ["corrupt", "truncate"])
async def test_a_damaged_message_is_delivered_and_its_frame_is_corrupt(faulty, kind, nbytes):
    a, b, faults = await faulty(Fault(kind, nth=1, at=2_005))
    data = frame(nbytes)
    kept = bytes(data)
    for i in range(3):
        buffer = bytearray(len(data))
        receive = b.receive(7, buffer)
        await a.send(b.address, 7, data)
        got = await receive.wait()
        if i == 1 and not (kind == "truncate" and len(data) <= 2_005):
            with pytest.raises(CorruptFrame):
                open_frame(buffer, got, OURS)
        else:
            open_frame(buffer, got, OURS)
    assert data == kept, "the sender's own buffer is not damaged"
    assert [fault.kind for fault in faults.fired] == [kind]
    assert faults.plan == []


@pytest.mark.parametrize("nbytes", SIZES)
async def test_a_dropped_message_never_arrives(faulty, nbytes):
    a, b, _ = await faulty(Fault("drop"))
    receive = b.receive(7, bytearray(nbytes))
    await a.send(b.address, 7, bytes(nbytes))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(receive.wait(), 0.05)
    await a.send(b.address, 7, bytes(nbytes))
    assert await receive.wait() == nbytes


@pytest.mark.parametrize("nbytes", SIZES)
async def test_a_duplicate_arrives_twice(faulty, nbytes):
    a, b, _ = await faulty(Fault("duplicate"))
    receives = [b.receive(7, bytearray(nbytes)) for _ in range(2)]
    await a.send(b.address, 7, bytes(nbytes))
    assert [await receive.wait() for receive in receives] == [nbytes, nbytes]


async def test_a_delayed_message_is_late(faulty):
    a, b, _ = await faulty(Fault("delay", seconds=0.1))
    receive = b.receive(7, bytearray(4))
    start = time.monotonic()
    await a.send(b.address, 7, b"late")
    await receive.wait()
    assert time.monotonic() - start >= 0.1


async def test_a_fault_can_be_aimed_at_a_tag(faulty):
    a, b, faults = await faulty(Fault("drop", tag=9, nth=1))
    for _ in range(2):
        for tag in (8, 9):
            await a.send(b.address, tag, b"x")
    assert b._mailbox.waiting_count == 3
    assert len(faults.fired) == 1


@pytest.mark.parametrize("at", [0, 2_000_000])
async def test_a_peer_lost_in_the_middle_is_seen_by_the_receiver(faulty, at):
    a, b, _ = await faulty(Fault("lose_peer", at=at))
    receive = b.receive(7, bytearray(3_000_000))
    with pytest.raises(PeerLost):
        await a.send(b.address, 7, bytes(3_000_000))
    with pytest.raises(PeerLost):
        await receive.wait()
    assert b.stats.peers_lost == 1
