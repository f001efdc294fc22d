"""What every transport promises, over every transport."""

import asyncio
import secrets
from collections.abc import Callable

import pytest

from kvrelay_protocol.errors import PeerLost, TransferCancelled
from kvrelay_transfer.transport import KVTransport, Truncated

MIB = 1024 * 1024
SIZES = [0, 1, 159, 4096, 7999, 8000, 8001, 8192, 65_537, MIB, 4 * MIB, 4 * MIB + 1, 16 * MIB]

Pair = tuple[KVTransport, KVTransport]


BLOCKS = [bytes((i * 7 + seed) % 256 for i in range(65_521)) for seed in range(16)]


def pattern(nbytes: int, seed: int = 0) -> bytes:
    block = BLOCKS[seed % 16]
    return (block * (nbytes // len(block) + 1))[:nbytes]


async def soon(awaitable, seconds: float = 60.0):
    return await asyncio.wait_for(awaitable, seconds)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0.002)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await turns(1)


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("receive_first", [True, False])
async def test_a_message_arrives_whole(pair: Pair, nbytes: int, receive_first: bool):
    a, b = pair
    data, buffer, tag = pattern(nbytes), bytearray(nbytes + 3), secrets.randbits(64)
    if receive_first:
        receive = b.receive(tag, buffer)
        await soon(a.send(b.address, tag, data))
    else:
        sending = asyncio.create_task(a.send(b.address, tag, data))
        await turns(5)
        receive = b.receive(tag, buffer)
        await soon(sending)
    assert await soon(receive.wait()) == nbytes
    assert await receive.wait() == nbytes, "the outcome can be asked for again"
    assert buffer[:nbytes] == data
    assert buffer[nbytes:] == bytes(3), "nothing is written past the message"
    assert receive.done


@pytest.mark.parametrize("nbytes", [100, 20_000, 5 * MIB])
async def test_messages_with_one_tag_keep_their_order(pair: Pair, nbytes: int):
    a, b = pair
    buffers = [bytearray(nbytes) for _ in range(6)]
    early = [b.receive(9, buffer) for buffer in buffers[:3]]
    sends = [asyncio.create_task(a.send(b.address, 9, bytes([i]) * nbytes)) for i in range(6)]
    await turns(3)
    late = [b.receive(9, buffer) for buffer in buffers[3:]]
    for receive in early + late:
        assert await soon(receive.wait()) == nbytes
    await soon(asyncio.gather(*sends))
    assert [buffer[-1] for buffer in buffers] == list(range(6))


async def test_sizes_mixed_under_one_tag_keep_their_order(pair: Pair):
    a, b = pair
    sizes = [10, MIB, 0, 9000, 8000, 3 * MIB]
    sends = [asyncio.create_task(a.send(b.address, 3, pattern(n, n))) for n in sizes]
    await turns(3)
    for nbytes in sizes:
        buffer = bytearray(4 * MIB)
        assert await soon(b.receive(3, buffer).wait()) == nbytes
        assert buffer[:nbytes] == pattern(nbytes, nbytes)
    await soon(asyncio.gather(*sends))


async def test_many_tags_at_once_in_both_directions(pair: Pair):
    tags = [secrets.randbits(64) for _ in range(150)]
    jobs = []
    for i, tag in enumerate(tags):
        nbytes = [64, 9000, 200_000][i % 3]
        source, target = pair if i % 2 else pair[::-1]
        buffer = bytearray(nbytes)
        receive = target.receive(tag, buffer)
        jobs.append(
            (
                buffer,
                pattern(nbytes, i),
                receive,
                source.send(target.address, tag, pattern(nbytes, i)),
            )
        )
    await soon(asyncio.gather(*(job[3] for job in reversed(jobs))), 30)
    for buffer, data, receive, _ in jobs:
        assert await soon(receive.wait()) == len(data)
        assert buffer == data


async def test_several_senders_to_one_receiver(make):
    target, *sources = [await make() for _ in range(4)]
    buffers = [bytearray(MIB) for _ in sources]
    receives = [target.receive(i, buffer) for i, buffer in enumerate(buffers)]
    await soon(
        asyncio.gather(
            *(s.send(target.address, i, bytes([i + 1]) * MIB) for i, s in enumerate(sources))
        )
    )
    for receive in receives:
        await soon(receive.wait())
    assert [buffer[0] for buffer in buffers] == [1, 2, 3]


async def test_a_posted_receive_can_be_cancelled(pair: Pair):
    a, b = pair
    buffer = bytearray(MIB)
    receive = b.receive(1, buffer)
    assert await soon(receive.cancel()) is True
    assert receive.done
    with pytest.raises(TransferCancelled):
        await receive.wait()
    again = bytearray(MIB)
    second = b.receive(1, again)
    await soon(a.send(b.address, 1, pattern(MIB)))
    assert await soon(second.wait()) == MIB
    assert buffer == bytes(MIB), "a cancelled buffer stays untouched"
    assert again == pattern(MIB)


async def test_a_completed_receive_cannot_be_cancelled(pair: Pair):
    a, b = pair
    buffer = bytearray(10)
    receive = b.receive(1, buffer)
    await soon(a.send(b.address, 1, b"0123456789"))
    await soon(receive.wait())
    assert await soon(receive.cancel()) is False
    assert buffer == b"0123456789"


async def test_cancelling_a_waiting_task_leaves_the_receive_posted(pair: Pair):
    a, b = pair
    buffer = bytearray(10)
    receive = b.receive(1, buffer)
    waiting = asyncio.create_task(receive.wait())
    await turns(2)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await soon(a.send(b.address, 1, b"0123456789"))
    assert await soon(receive.wait()) == 10


@pytest.mark.parametrize("pause", [0.0, 0.001, 0.005, 0.02])
async def test_a_receive_cancelled_while_it_is_written_leaves_the_buffer_alone(
    pair: Pair, pause: float
):
    a, b = pair
    buffer = bytearray(64 * MIB)
    receive = b.receive(1, buffer)
    sending = asyncio.create_task(a.send(b.address, 1, pattern(64 * MIB)))
    await asyncio.sleep(pause)
    cancelled = await soon(receive.cancel())
    seen = bytes(buffer)
    if cancelled:
        with pytest.raises(TransferCancelled):
            await receive.wait()
    await turns(30)
    assert buffer == seen, "written after the cancel was confirmed"
    assert cancelled or pause, "the message was not even announced"
    sending.cancel()  # it waits for another receive where it was announced after the cancel
    await soon(asyncio.gather(sending, return_exceptions=True))
    # The connection is as good as before.
    small = bytearray(4)
    last = b.receive(2, small)
    await soon(a.send(b.address, 2, b"fine"))
    assert await soon(last.wait()) == 4


@pytest.mark.parametrize("receive_first", [True, False])
@pytest.mark.parametrize("pause", [0.0, 0.001, 0.005, 0.02])
async def test_a_cancelled_send_frees_its_buffer(pair: Pair, pause: float, receive_first: bool):
    a, b = pair
    data, buffer = bytearray(pattern(64 * MIB)), bytearray(64 * MIB)
    receive = b.receive(1, buffer) if receive_first else None
    sending = asyncio.create_task(a.send(b.address, 1, data))
    await asyncio.sleep(pause)
    in_time = sending.cancel()
    if in_time:
        with pytest.raises(asyncio.CancelledError):
            await soon(sending)
    data[:] = b"\xff" * len(data)  # ours again: nobody may read it any more
    del data[:]  # and nobody may hold on to it
    if receive is None:
        await turns(5)
        buffer = bytearray(7)
        receive = b.receive(1, buffer)
    await soon(a.send(b.address, 1, b"instead"))
    (outcome,) = await soon(asyncio.gather(receive.wait(), return_exceptions=True))
    if outcome == 7:
        # Taken back before a byte moved: the receive stayed posted, for the next message.
        assert buffer == b"instead" + bytes(len(buffer) - 7)
        return
    whole = leading_mib(buffer, pattern(64 * MIB))
    assert buffer[whole:] == bytes(64 * MIB - whole), "read after its sender had it back"
    if isinstance(outcome, TransferCancelled):
        assert in_time
        assert whole < 64 * MIB
    else:
        # The last byte had left when the cancel came.
        assert outcome == whole == 64 * MIB


def leading_mib(buffer: bytearray, message: bytes) -> int:
    """How many bytes of the message the buffer begins with, in whole MiB."""
    starts = range(0, len(message), MIB)
    other = (i for i in starts if buffer[i : i + MIB] != message[i : i + MIB])
    return next(other, len(message))


async def under_way(a: KVTransport, b: KVTransport) -> None:
    """Wait until the first of many pieces of a message from a to b moves; each takes a turn of the loop."""
    async with asyncio.timeout(60):
        while not getattr(b, "_incoming", None) and not any(
            s.under_way for p in getattr(a, "_peers", {}).values() for s in p.sends.values()
        ):
            await asyncio.sleep(0)


async def test_a_send_cancelled_twice_still_confirms(pair: Pair):
    a, b = pair
    b.receive(1, bytearray(64 * MIB))
    data = bytearray(64 * MIB)
    sending = asyncio.create_task(a.send(b.address, 1, data))
    await under_way(a, b)
    sending.cancel()
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(sending)
    del data[:]


@pytest.mark.parametrize("nbytes", [11, 20_000])
async def test_too_long_a_message_is_refused_unwritten(pair: Pair, nbytes: int):
    a, b = pair
    buffer = bytearray(10)
    receive = b.receive(1, buffer)
    sending = asyncio.create_task(a.send(b.address, 1, b"x" * nbytes))
    with pytest.raises(Truncated, match=f"{nbytes} bytes.* 10"):
        await soon(receive.wait())
    if nbytes > 8000:
        with pytest.raises(TransferCancelled, match="refused"):
            await soon(sending)
    else:
        await soon(sending)
    assert buffer == bytes(10)
    receive = b.receive(1, buffer)
    await soon(a.send(b.address, 1, b"0123456789"))
    assert await soon(receive.wait()) == 10


async def test_messages_nobody_waits_for_are_bounded(pair: Pair):
    a, b = pair
    b._mailbox.max_waiting = 8
    sends = [asyncio.create_task(a.send(b.address, i, bytes(10_000))) for i in range(12)]
    refused = sends[8:]
    for send in refused:
        with pytest.raises(TransferCancelled, match="refused"):
            await soon(send)
    for i in range(20, 40):
        await soon(a.send(b.address, i, b"small"))
    await until(lambda: b.stats.refused >= 24)
    assert b._mailbox.waiting_count == 8
    assert b.stats.refused == 24
    for i in range(8):
        assert await soon(b.receive(i, bytearray(10_000)).wait()) == 10_000
    await soon(asyncio.gather(*sends[:8]))


async def test_connecting_ahead_of_the_first_message_changes_nothing_else(pair: Pair):
    a, b = pair
    a.connect(b.address)
    a.connect(b.address)
    await turns()
    receive = b.receive(3, bytearray(20_000))
    await soon(a.send(b.address, 3, bytes(20_000)))
    assert await soon(receive.wait()) == 20_000


async def test_late_messages_of_transfers_that_ended_do_not_fill_the_waiting_room(pair: Pair):
    a, b = pair
    b._mailbox.max_waiting = 8
    for tag in range(100, 140):
        receive = b.receive(tag, bytearray(10_000))
        assert await receive.cancel()
        if tag % 2:
            await soon(a.send(b.address, tag, b"a record that was on its way"))
        b.end(tag)
        await soon(a.send(b.address, tag, b"late"))
        with pytest.raises(TransferCancelled, match="over"):
            await soon(a.send(b.address, tag, bytes(10_000)))
    await until(lambda: b.stats.late >= 80)
    assert b._mailbox.waiting_count == 0
    assert b.stats.refused == 0
    receive = b.receive(7, bytearray(10_000))
    await soon(a.send(b.address, 7, bytes(10_000)))
    assert await soon(receive.wait()) == 10_000


async def test_ended_tags_are_remembered_within_bounds(pair: Pair):
    _, b = pair
    for tag in range(10_000):
        b.end(tag)
    assert len(b._mailbox.over) == 8192


async def test_a_waiting_message_of_a_lost_peer_is_forgotten(pair: Pair):
    a, b = pair
    sending = asyncio.create_task(a.send(b.address, 1, bytes(MIB)))
    await until(lambda: b._mailbox.waiting_count == 1)
    await a.abort()
    with pytest.raises((TransferCancelled, PeerLost)):
        await soon(sending)
    await until(lambda: not b._mailbox.waiting_count)


async def test_sending_to_one_that_is_gone_is_a_lost_peer(make):
    a, b, c = await make(), await make(), await make()
    b.receive(1, bytearray(4))
    await soon(a.send(b.address, 1, b"once"))
    await b.abort()
    with pytest.raises(PeerLost):
        async with asyncio.timeout(60):
            while True:
                await a.send(b.address, 1, b"more")
                await turns(1)
    with pytest.raises(PeerLost):
        await soon(a.send(b.address, 2, bytes(MIB)), 12)
    receive = c.receive(1, bytearray(4))
    await soon(a.send(c.address, 1, b"else"))
    assert await soon(receive.wait()) == 4


@pytest.mark.parametrize("aborting", ["sender", "receiver"])
async def test_an_abort_in_the_middle_of_a_message_is_seen_by_the_other(make, aborting: str):
    a, b, c = await make(), await make(), await make()
    buffer = bytearray(64 * MIB)
    receive = b.receive(1, buffer)
    sending = asyncio.create_task(a.send(b.address, 1, bytes(64 * MIB)))
    await under_way(a, b)
    await soon((a if aborting == "sender" else b).abort())
    if aborting == "sender":
        with pytest.raises((PeerLost, TransferCancelled)):
            await soon(sending)
        with pytest.raises(PeerLost):
            await soon(receive.wait())
        survivor = b
    else:
        with pytest.raises(PeerLost):
            await soon(sending)
        with pytest.raises((PeerLost, TransferCancelled)):
            await soon(receive.wait())
        survivor = a
    seen = bytes(buffer)
    await turns()
    assert buffer == seen
    small = bytearray(2)
    last = c.receive(5, small)
    await soon(survivor.send(c.address, 5, b"ok"))
    assert await soon(last.wait()) == 2


def _all_begun(transport: KVTransport) -> bool:
    """Whether the other side has taken every long message; where that is not known, they are taken at once."""
    peers = getattr(transport, "_peers", {}).values()
    return all(sending.data_tag is not None for peer in peers for sending in peer.sends.values())


async def test_close_delivers_what_was_sent(pair: Pair):
    a, b = pair
    buffers = [bytearray(n) for n in (10, 8000, MIB, 16 * MIB)]
    receives = [b.receive(i, buffer) for i, buffer in enumerate(buffers)]
    sends = [
        asyncio.create_task(a.send(b.address, i, pattern(len(buffer), i)))
        for i, buffer in enumerate(buffers)
    ]
    await turns(2)
    while not _all_begun(a):
        await turns(1)
    await soon(a.close())
    await soon(asyncio.gather(*sends))
    for i, (receive, buffer) in enumerate(zip(receives, buffers, strict=True)):
        assert await soon(receive.wait()) == len(buffer)
        assert buffer == pattern(len(buffer), i)


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_the_end_cancels_receives_and_refuses_more(pair: Pair, end: str):
    a, b = pair
    receive = b.receive(1, bytearray(10))
    await soon(getattr(b, end)())
    await soon(getattr(b, end)())
    with pytest.raises(TransferCancelled):
        await soon(receive.wait())
    with pytest.raises(TransferCancelled):
        await soon(b.send(a.address, 1, b"x"))
    with pytest.raises(TransferCancelled):
        b.receive(1, bytearray(1))


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_the_end_leaves_no_task_thread_descriptor_or_segment(
    leaves_nothing: None, scheme: str, end: str
):
    from kvrelay_transfer.transport import create_transport

    tasks = asyncio.all_tasks()
    for _ in range(2):
        a, b = create_transport(f"{scheme}://"), create_transport(f"{scheme}://")
        await a.start()
        await b.start()
        buffer = bytearray(10 * MIB)
        receive = b.receive(1, buffer)
        await soon(a.send(b.address, 1, pattern(10 * MIB)))
        await soon(receive.wait())
        stuck = asyncio.create_task(a.send(b.address, 2, bytes(MIB)))
        b.receive(3, bytearray(1))
        await turns(2)
        await soon(asyncio.gather(getattr(a, end)(), getattr(b, end)()))
        with pytest.raises((PeerLost, TransferCancelled)):
            await soon(stuck)
    await until(lambda: asyncio.all_tasks() == tasks)


async def test_an_abort_while_bytes_move_leaves_nothing_either(leaves_nothing: None, scheme: str):
    from kvrelay_transfer.transport import create_transport

    a, b = create_transport(f"{scheme}://"), create_transport(f"{scheme}://")
    await a.start()
    await b.start()
    buffer = bytearray(64 * MIB)
    receive = b.receive(1, buffer)
    sending = asyncio.create_task(a.send(b.address, 1, bytes(64 * MIB)))
    await under_way(a, b)
    await soon(a.abort())
    await soon(b.abort())
    for outcome in (sending, receive.wait()):
        with pytest.raises((PeerLost, TransferCancelled)):
            await soon(outcome)


async def test_buffers_that_cannot_work_are_refused(pair: Pair):
    a, b = pair
    with pytest.raises(ValueError, match="writable"):
        b.receive(1, b"read-only")
    with pytest.raises(ValueError, match="contiguous"):
        await a.send(b.address, 1, memoryview(bytes(100))[::2])


async def test_the_transport_really_used_is_known(pair: Pair, scheme: str):
    a, b = pair
    assert scheme != "ucx" or a.transport_of(b.address) == ""
    receive = b.receive(1, bytearray(1))
    await soon(a.send(b.address, 1, b"x"))
    await soon(receive.wait())
    await until(lambda: a.transport_of(b.address))
    assert a.transport_of(b.address).split("/")[0] == {"ucx": "tcp", "inproc": "inproc"}[scheme]


async def test_counters_follow(pair: Pair):
    a, b = pair
    receive = b.receive(1, bytearray(MIB))
    await soon(a.send(b.address, 1, bytes(MIB)))
    await soon(receive.wait())
    assert (a.stats.messages_sent, a.stats.bytes_sent) == (1, MIB)
    assert (b.stats.messages_received, b.stats.bytes_received) == (1, MIB)
