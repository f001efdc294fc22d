import asyncio
import gc
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from kvrelay_transfer.transport import KVTransport, create_transport

PEER = Path(__file__).with_name("peer_main.py")


class PeerProcess:
    """A child that owns one transport; see peer_main.py."""

    def __init__(self, process: asyncio.subprocess.Process, address: bytes) -> None:
        self.process = process
        self.address = address

    @classmethod
    async def start(cls, uri: str = "ucx://") -> "PeerProcess":
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(PEER),
            uri,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        return cls(process, bytes.fromhex(json.loads(line)["address"]))

    def tell(self, **command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    async def hear(self) -> dict[str, object]:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), 60)
        answer: dict[str, object] = json.loads(line)
        return answer

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                await asyncio.wait_for(self.process.wait(), 60)
            except TimeoutError:
                self.process.kill()
        await self.process.wait()


@pytest.fixture
async def spawn() -> AsyncIterator[Callable[..., Awaitable[PeerProcess]]]:
    started: list[PeerProcess] = []

    async def start(uri: str = "ucx://") -> PeerProcess:
        started.append(await PeerProcess.start(uri))
        return started[-1]

    yield start
    for peer in started:
        await peer.stop()


@pytest.fixture(params=["inproc", "ucx"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def make(scheme: str) -> AsyncIterator[Callable[..., Awaitable[KVTransport]]]:
    """Started transports of one scheme; all are checked and aborted afterwards."""
    started: list[KVTransport] = []

    async def start(query: str = "") -> KVTransport:
        transport = create_transport(f"{scheme}://{'?' + query if query else ''}")
        await transport.start()
        started.append(transport)
        return transport

    yield start
    for transport in started:
        transport.check_integrity()
        await transport.abort()


@pytest.fixture
async def pair(make) -> tuple[KVTransport, KVTransport]:
    return await make(), await make()


def open_files() -> dict[str, str]:
    """Descriptor -> what it is, of this process."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except OSError:
            continue  # the descriptor of this listing itself
    return found


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def shared_segments() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Descriptors, threads and shared memory are as before, whatever the test did."""
    gc.collect()
    before = len(open_files()), threads(), shared_segments()
    yield
    gc.collect()
    assert (len(open_files()), threads(), shared_segments()) == before, open_files()
