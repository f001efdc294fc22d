"""UCX between processes that die, stand still and come back."""

import asyncio
import signal
import time
from pathlib import Path

import pytest

from kvrelay_protocol.errors import PeerLost, TransferCancelled
from kvrelay_transfer.ucx import UcxOptions, UcxTransport

MIB = 1024 * 1024
BIG = 64 * MIB


async def soon(awaitable, seconds: float = 60.0):
    return await asyncio.wait_for(awaitable, seconds)


@pytest.fixture
async def here():
    transport = UcxTransport(UcxOptions(cancel_grace_s=0.5, flush_timeout_s=1))
    await transport.start()
    yield transport
    transport.check_integrity()
    await transport.abort()


async def check_usable(here: UcxTransport, peer) -> None:
    """A message each way between the survivor and a process it has never met."""
    peer.tell(do="receive", tag=71, nbytes=2 * MIB)
    assert await peer.hear() == {"posted": 71}
    await soon(here.send(peer.address, 71, bytes([71]) * 2 * MIB))
    assert await peer.hear() == {"done": 71, "nbytes": 2 * MIB, "same": True}
    buffer = bytearray(2 * MIB)
    receive = here.receive(72, buffer)
    peer.tell(do="send", peer=here.address.hex(), tag=72, nbytes=2 * MIB)
    assert await soon(receive.wait()) == 2 * MIB
    assert buffer == bytes([72]) * 2 * MIB


async def test_messages_pass_both_ways(here: UcxTransport, spawn):
    peer = await spawn()
    await check_usable(here, peer)
    assert here.transport_of(peer.address).startswith("tcp/")


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_receiver_killed_in_the_middle_is_a_lost_peer(here, spawn, signal_number: int):
    peer = await spawn()
    peer.tell(do="receive", tag=1, nbytes=BIG)
    await peer.hear()
    data = bytearray(BIG)
    sending = asyncio.create_task(here.send(peer.address, 1, data))
    await under_way(lambda: any(s.pieces for p in here._peers.values() for s in p.sends.values()))
    peer.signal(signal_number)
    with pytest.raises(PeerLost):
        await soon(sending)
    del data[:]  # nobody holds on to the buffer
    await check_usable(here, await spawn())


async def test_a_sender_killed_in_the_middle_is_a_lost_peer(here: UcxTransport, spawn):
    peer = await spawn()
    buffer = bytearray(BIG)
    receive = here.receive(2, buffer)
    peer.tell(do="send", peer=here.address.hex(), tag=2, nbytes=BIG)
    await peer.hear()
    await under_way(lambda: any(buffer[:: MIB // 2]))
    peer.signal(signal.SIGKILL)
    with pytest.raises(PeerLost):
        await soon(receive.wait())
    seen = bytes(buffer)
    await asyncio.sleep(0.1)
    assert buffer == seen
    assert not all(buffer[:: MIB // 2]), "the message was complete: nothing was tested"
    buffer.extend(b"x")  # nobody holds on to it
    await check_usable(here, await spawn())


async def under_way(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.0005)


async def test_an_announced_message_of_a_killed_sender_is_forgotten(here: UcxTransport, spawn):
    peer = await spawn()
    peer.tell(do="send", peer=here.address.hex(), tag=2, nbytes=BIG)
    await peer.hear()
    await under_way(lambda: here._mailbox.waiting_count)
    peer.signal(signal.SIGKILL)
    await under_way(lambda: not here._mailbox.waiting_count)
    await check_usable(here, await spawn())


async def test_a_send_to_a_process_that_ended_long_ago_is_a_lost_peer(here: UcxTransport, spawn):
    peer = await spawn()
    peer.signal(signal.SIGKILL)
    await peer.process.wait()
    for nbytes in (10, MIB):
        with pytest.raises(PeerLost):
            async with asyncio.timeout(60):
                while True:
                    await here.send(peer.address, 1, bytes(nbytes))
                    await asyncio.sleep(0.01)
    await check_usable(here, await spawn())


async def test_a_send_to_one_that_stands_still_can_be_cancelled(here: UcxTransport, spawn):
    peer = await spawn()
    peer.tell(do="receive", tag=1, nbytes=BIG)
    await peer.hear()
    data = bytearray(BIG)
    sending = asyncio.create_task(here.send(peer.address, 1, data))
    await under_way(lambda: any(s.pieces for p in here._peers.values() for s in p.sends.values()))
    peer.signal(signal.SIGSTOP)
    await asyncio.sleep(0.2)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(sending)
    del data[:]
    await check_usable(here, await spawn())
    peer.signal(signal.SIGCONT)
    assert (await peer.hear())["error"] in ("PeerLost", "TransferCancelled")


async def test_a_receive_from_one_that_stands_still_can_be_cancelled(here: UcxTransport, spawn):
    peer = await spawn()
    buffer = bytearray(BIG)
    receive = here.receive(2, buffer)
    peer.tell(do="send", peer=here.address.hex(), tag=2, nbytes=BIG)
    await peer.hear()
    await under_way(lambda: any(buffer[:: MIB // 2]))
    peer.signal(signal.SIGSTOP)
    await asyncio.sleep(0.2)
    assert await soon(receive.cancel()) is True
    with pytest.raises(TransferCancelled):
        await receive.wait()
    seen = bytes(buffer)
    peer.signal(signal.SIGCONT)
    assert (await peer.hear())["error"] in ("PeerLost", "TransferCancelled")
    await asyncio.sleep(0.1)
    assert buffer == seen, "written after the cancel was confirmed"
    await check_usable(here, await spawn())
    await check_usable(here, peer)


async def test_closing_beside_one_that_stands_still_does_not_hang(spawn):
    transport = UcxTransport(UcxOptions(flush_timeout_s=0.5))
    await transport.start()
    peer = await spawn()
    await check_usable(transport, peer)
    peer.tell(do="send", peer=transport.address.hex(), tag=5, nbytes=BIG)
    await peer.hear()
    await under_way(lambda: transport._mailbox.waiting_count)
    peer.signal(signal.SIGSTOP)
    sending = asyncio.create_task(transport.send(peer.address, 9, bytes(MIB)))
    await asyncio.sleep(0)
    await soon(transport.close())
    with pytest.raises((PeerLost, TransferCancelled)):
        await sending


async def test_an_idle_transport_uses_next_to_no_processor(here: UcxTransport, spawn):
    peer = await spawn()
    await check_usable(here, peer)
    receive = here.receive(1, bytearray(1))
    before, start = time.process_time(), time.monotonic()
    await asyncio.sleep(1.5)
    used = (time.process_time() - before) / (time.monotonic() - start)
    await receive.cancel()
    assert used < 0.25, f"{used:.1%} of a core while idle"


def visible() -> set[str]:
    return {entry.name for folder in ("/dev/shm", "/tmp") for entry in Path(folder).iterdir()}


@pytest.mark.parametrize("how", ["kill", "leave"])
async def test_a_process_leaves_no_shared_memory_behind(spawn, how: str):
    # Other processes of the machine may use UCX too: only segments of our child count.
    before = visible()
    peer = await spawn()
    if how == "kill":
        peer.signal(signal.SIGKILL)
    else:
        assert peer.process.stdin is not None
        peer.process.stdin.close()
    code = await soon(peer.process.wait())
    assert code == (-signal.SIGKILL if how == "kill" else 0)
    left = visible() - before
    assert not [name for name in left if "ucx" in name.lower() or str(peer.process.pid) in name]


async def test_trying_to_reach_a_dead_peer_again_and_again_costs_no_descriptors(
    here, spawn, monkeypatch
):
    monkeypatch.setattr("kvrelay_transfer.ucx._OUT_OF_REACH_S", 3600.0)
    peer = await spawn()
    await check_usable(here, peer)
    peer.signal(signal.SIGKILL)
    await under_way(lambda: not here._peers)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        here.connect(peer.address)
        with pytest.raises(PeerLost):
            await soon(here.send(peer.address, 3, bytes(10)))
    assert len(list(descriptors.iterdir())) <= before + 1
    await check_usable(here, await spawn())
