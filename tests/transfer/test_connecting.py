"""How two UCX transports meet: a HELLO by rendezvous, and nothing else before its answer."""

import asyncio

from kvrelay_transfer.ucx import UcxTransport

RENDEZVOUS = 8192
"""From this length on UCX resolves the peer before it sends (RNDV_THRESH, see `ucx_config`)."""


async def started(count: int) -> list[UcxTransport]:
    transports = [UcxTransport() for _ in range(count)]
    for transport in transports:
        await transport.start()
    return transports


async def test_nothing_but_a_long_hello_is_said_before_the_welcome(monkeypatch):
    a, b = await started(2)
    said: list[tuple[int, int, bool]] = []
    send = a._worker.send

    def record(endpoint, tag, view, on_done):
        (peer,) = a._peers.values()
        said.append((tag, len(view), peer.welcomed))
        return send(endpoint, tag, view, on_done)

    monkeypatch.setattr(a._worker, "send", record)
    buffers = [bytearray(100), bytearray(20_000)]
    receives = [b.receive(n, buffer) for n, buffer in enumerate(buffers)]
    await asyncio.gather(
        *(a.send(b.address, n, bytes([n + 1]) * len(held)) for n, held in enumerate(buffers))
    )
    assert [await receive.wait() for receive in receives] == [100, 20_000]
    assert buffers == [b"\1" * 100, b"\2" * 20_000]
    early = [(tag, size) for tag, size, welcomed in said if not welcomed]
    ((tag, size),) = early
    assert size > RENDEZVOUS
    assert tag != b._control_tag
    assert all(welcomed for _, _, welcomed in said[1:])
    await a.close()
    await b.close()


async def test_hellos_that_break_off_leave_room_for_more():
    (here,) = await started(1)
    for n in range(30):
        (gone,) = await started(1)
        gone.connect(here.address)
        for _ in range(n % 6):
            await asyncio.sleep(0.0005)
        await gone.abort()
    (peer,) = await started(1)
    buffer = bytearray(20_000)
    receive = here.receive(1, buffer)
    async with asyncio.timeout(60):
        await peer.send(here.address, 1, b"x" * 20_000)
        assert await receive.wait() == 20_000
    await peer.close()
    await here.close()
