"""Measure a transport between two processes of this machine: `python -m kvrelay_transfer.probe URI`.

The parent spawns the child and both run the same transport; nothing is forked, so it may be used
from a process with threads or a GPU. The child ends with its standard input, thus with its parent.
"""

import asyncio
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kvrelay_protocol.errors import KvrelayError, TransferError, TransportMisconfigured

from .staging import page_aligned
from .transport import Buffer, KVTransport, create_transport

MIB = 1024 * 1024
DEFAULT_SIZES = (MIB, 8 * MIB, 64 * MIB)
_PING_BYTES = 4096
_PINGS = 200
_WARM_PINGS = 20
_ROUNDS = 3
_ROUND_BYTES = 128 * MIB
_PING, _PONG, _DATA, _ACK = 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a transport does between two processes of this machine."""

    uri: str
    transport: str
    """What was really chosen, such as "tcp/lo"."""
    gb_per_s: dict[int, float]
    """Message size in bytes -> median 10^9 bytes per second, one way, two messages in flight."""
    latency_us: float
    """Half the median round trip of 4 KiB, in microseconds."""

    def __str__(self) -> str:
        rates = ", ".join(f"{size / MIB:g} MiB {rate:.2f}" for size, rate in self.gb_per_s.items())
        return f"{self.uri}: {self.transport}, GB/s at {rates}; 4 KiB in {self.latency_us:.0f} us"


def probe(
    uri: str = "ucx://", sizes: Sequence[int] = DEFAULT_SIZES, timeout_s: float = 30.0
) -> ProbeResult:
    """Measure from a process without a running loop; see `measure`."""
    return asyncio.run(measure(uri, sizes, timeout_s))


async def measure(
    uri: str = "ucx://", sizes: Sequence[int] = DEFAULT_SIZES, timeout_s: float = 30.0
) -> ProbeResult:
    """Measure latency and throughput between this process and a child of it.

    `inproc://` is measured within this process. Takes about a second on loopback TCP.

    Raises:
        TransportMisconfigured: the transport does not start, here or in the child.
        TransferError: the child died, or the measurement did not end in `timeout_s`.
    """
    transport = create_transport(uri)
    await transport.start()
    try:
        async with asyncio.timeout(timeout_s):
            if transport.scheme == "inproc":
                return await _with_task(uri, transport, sizes)
            return await _with_child(uri, transport, sizes)
    except TimeoutError as error:
        raise TransferError(f"probing {uri} did not end within {timeout_s:g} s") from error
    finally:
        await transport.abort()


async def _with_task(uri: str, transport: KVTransport, sizes: Sequence[int]) -> ProbeResult:
    other = create_transport(uri)
    await other.start()
    answering = asyncio.create_task(_answer(other, transport.address, sizes))
    try:
        return await _ask(uri, transport, other.address, sizes)
    finally:
        await _stopped(answering)
        await other.abort()


async def _with_child(uri: str, transport: KVTransport, sizes: Sequence[int]) -> ProbeResult:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "kvrelay_transfer.probe",
        "--child",
        uri,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    if child.stdin is None or child.stdout is None:
        raise TransferError("the probe's child has no pipes")
    try:
        hello = json.loads(await child.stdout.readline() or b'{"error": "it ended at once"}')
        if "error" in hello:
            raise TransportMisconfigured(f"the probe's child could not start: {hello['error']}")
        plan = {"peer": transport.address.hex(), "sizes": list(sizes)}
        child.stdin.write(json.dumps(plan).encode() + b"\n")
        asking = asyncio.create_task(_ask(uri, transport, bytes.fromhex(hello["address"]), sizes))
        ended = asyncio.create_task(child.wait())
        try:
            await asyncio.wait({asking, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise TransferError(f"the probe's child ended with status {child.returncode}")
            return asking.result()
        finally:
            await _stopped(asking, ended)
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def _ask(uri: str, transport: KVTransport, peer: bytes, sizes: Sequence[int]) -> ProbeResult:
    """The measuring side."""
    small, trips = page_aligned(_PING_BYTES), []
    for _ in range(_WARM_PINGS + _PINGS):
        start = time.perf_counter()
        pong = transport.receive(_PONG, small)
        await transport.send(peer, _PING, small)
        await pong.wait()
        trips.append(time.perf_counter() - start)
    rates = {size: await _throughput(transport, peer, size) for size in sizes}
    return ProbeResult(
        uri=uri,
        transport=transport.transport_of(peer),
        gb_per_s=rates,
        latency_us=statistics.median(trips[_WARM_PINGS:]) / 2 * 1e6,
    )


async def _throughput(transport: KVTransport, peer: bytes, size: int) -> float:
    count, rates = messages_per_round(size), []
    buffer = _touched(size)
    for _ in range(_ROUNDS):
        ack = transport.receive(_ACK, bytearray(1))
        start = time.perf_counter()
        await _send_two_at_a_time(transport, peer, buffer, count)
        await ack.wait()
        rates.append(count * size / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


async def _send_two_at_a_time(
    transport: KVTransport, peer: bytes, buffer: Buffer, count: int
) -> None:
    """Send `buffer` `count` times; returns or raises with nothing in flight."""
    left = iter(range(count))

    async def send() -> None:
        for _ in left:  # one iterator for both: whoever is free sends the next one
            await transport.send(peer, _DATA, buffer)

    senders = asyncio.create_task(send()), asyncio.create_task(send())
    try:
        await asyncio.gather(*senders)
    finally:
        await _stopped(*senders)


async def _stopped(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks and wait for their ends, taking what they raise: the first error was seen."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(transport: KVTransport, peer: bytes, sizes: Sequence[int]) -> None:
    """The other side: echo the pings, swallow the data, acknowledge each round."""
    small = page_aligned(_PING_BYTES)
    for _ in range(_WARM_PINGS + _PINGS):
        await transport.receive(_PING, small).wait()
        await transport.send(peer, _PONG, small)
    for size in sizes:
        buffers = [_touched(size), _touched(size)]
        for _ in range(_ROUNDS):
            receives = [transport.receive(_DATA, buffer) for buffer in buffers]
            for i in range(messages_per_round(size)):
                await receives[i % 2].wait()
                if i + 2 < messages_per_round(size):
                    receives[i % 2] = transport.receive(_DATA, buffers[i % 2])
            await transport.send(peer, _ACK, b"!")


def messages_per_round(size: int) -> int:
    """Messages of `size` bytes that one throughput measurement sends."""
    return max(2, min(64, _ROUND_BYTES // max(size, 1)))


def _touched(size: int) -> Buffer:
    buffer = page_aligned(max(size, 1))
    memoryview(buffer)[:] = bytes(max(size, 1))
    return memoryview(buffer)[:size]


def _follow_parent(loop: asyncio.AbstractEventLoop, plan: "asyncio.Future[str]") -> None:
    """Read the plan, then wait for the end of the input: the parent's, however it died."""
    line = sys.stdin.readline()
    if line:
        loop.call_soon_threadsafe(plan.set_result, line)
        sys.stdin.read()
    os._exit(0)


async def _child(uri: str) -> None:
    loop = asyncio.get_running_loop()
    plan: asyncio.Future[str] = loop.create_future()
    threading.Thread(target=_follow_parent, args=(loop, plan), daemon=True).start()
    try:
        transport = create_transport(uri)
        await transport.start()
    except KvrelayError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    print(json.dumps({"address": transport.address.hex()}), flush=True)
    order = json.loads(await plan)
    await _answer(transport, bytes.fromhex(order["peer"]), order["sizes"])
    await asyncio.Event().wait()  # the parent has the last word: it closes our input


def main(arguments: Sequence[str]) -> int:
    """Run the child's side (`--child URI`), or measure and print (`URI`)."""
    if arguments[:1] == ["--child"]:
        asyncio.run(_child(arguments[1]))
        return 0
    try:
        print(probe(arguments[0] if arguments else "ucx://"))
    except KvrelayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
