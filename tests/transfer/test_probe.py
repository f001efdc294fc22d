import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvrelay_protocol.errors import PeerLost, TransferError, TransportMisconfigured
from kvrelay_transfer.inproc import InprocTransport
from kvrelay_transfer.probe import _send_two_at_a_time, measure

MIB = 1024 * 1024


@pytest.mark.parametrize(("uri", "transport"), [("ucx://", "tcp/"), ("inproc://", "inproc")])
async def test_a_probe_says_what_was_chosen_and_how_fast_it_is(uri: str, transport: str):
    result = await measure(uri, [MIB, 4 * MIB])
    assert result.transport.startswith(transport)
    assert list(result.gb_per_s) == [MIB, 4 * MIB]
    assert all(rate > 0 for rate in result.gb_per_s.values())
    assert result.latency_us > 0
    assert transport in str(result)


async def test_a_probe_that_cannot_start_says_why():
    with pytest.raises(TransportMisconfigured, match="shared memory"):
        await measure("ucx://?tls=cma")


async def test_a_probe_that_takes_too_long_ends():
    with pytest.raises(TransferError, match=r"did not end within 0\.3 s"):
        await measure("ucx://", [64 * MIB] * 5000, timeout_s=0.3)


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def wait_for(condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    return value


async def test_the_child_dies_with_its_parent():
    code = "from kvrelay_transfer.probe import probe; probe('ucx://', [64 << 20] * 5000)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        (child,) = await wait_for(lambda: children_of(parent.pid))
        await asyncio.sleep(0.3)
    finally:
        parent.kill()
        parent.wait()
    await wait_for(lambda: not alive(child))


@pytest.fixture
async def unnoticed() -> AsyncIterator[list[dict[str, object]]]:
    """What the event loop reports because nobody else will, such as errors of forgotten tasks."""
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    yield reported
    gc.collect()
    assert reported == []


@pytest.mark.usefixtures("unnoticed")
async def test_a_killed_child_is_an_error_not_a_hang():
    measuring = asyncio.create_task(measure("ucx://", [64 * MIB] * 5000))
    before = set(children_of(os.getpid()))
    (child,) = await wait_for(lambda: set(children_of(os.getpid())) - before)
    await asyncio.sleep(1.0)
    os.kill(child, signal.SIGKILL)
    with pytest.raises(TransferError):
        await asyncio.wait_for(measuring, 60)


@pytest.mark.usefixtures("unnoticed")
async def test_both_sends_in_flight_may_fail_and_neither_is_forgotten():
    here, there = InprocTransport(), InprocTransport()
    await here.start()
    await there.start()
    sending = asyncio.create_task(_send_two_at_a_time(here, there.address, bytes(MIB), 8))
    await wait_for(lambda: here.stats.messages_sent)
    await asyncio.sleep(0.01)  # nobody receives: two of them wait
    assert here.stats.messages_sent == 2
    await there.abort()
    with pytest.raises(PeerLost):
        await sending
    assert here.stats.messages_sent == 2
    await here.abort()


def test_the_command_prints_one_line():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "kvrelay_transfer.probe", "ucx://?tls=sm"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 9
    assert done.stderr.startswith("error: ucx:// option tls='sm' names shared memory")
    assert len(done.stderr.splitlines()) == 1
