import asyncio
import mmap

import numpy as np
import pytest

from kvrelay_transfer.staging import StagingBuffers


@pytest.fixture
def pool():
    pool = StagingBuffers(2, 10_000)
    yield pool
    pool.check_integrity()


async def test_buffers_are_page_aligned_and_distinct(pool: StagingBuffers):
    a, b = await pool.acquire(), await pool.acquire()
    addresses = {np.frombuffer(s.view, np.uint8).ctypes.data for s in (a, b)}
    assert len(addresses) == 2
    assert all(address % mmap.PAGESIZE == 0 for address in addresses)
    assert len(a.view) == 10_000
    a.release()
    b.release()


async def test_the_pool_is_bounded_and_first_come_first_served(pool: StagingBuffers):
    a, b = await pool.acquire(), await pool.acquire()
    assert pool.try_acquire() is None
    order = []

    async def wait(name: int) -> None:
        with await pool.acquire():
            order.append(name)
            await asyncio.sleep(0)

    waiting = [asyncio.create_task(wait(i)) for i in range(4)]
    await asyncio.sleep(0.01)
    assert (order, pool.free, pool.held) == ([], 0, 2)
    pool.check_integrity()
    a.release()
    await asyncio.gather(*waiting)
    b.release()
    assert order == [0, 1, 2, 3]
    assert pool.free == 2


async def test_the_warmest_buffer_is_taken_first(pool: StagingBuffers):
    held = [await pool.acquire() for _ in range(pool.count)]
    for staging in held:
        staging.release()
    assert (await pool.acquire()).index == held[-1].index


async def test_a_buffer_is_released_exactly_once(pool: StagingBuffers):
    staging = await pool.acquire()
    staging.release()
    with pytest.raises(RuntimeError, match="twice"):
        staging.release()
    with pytest.raises(RuntimeError, match="after its release"):
        _ = staging.view
    again = await pool.acquire()
    with pytest.raises(RuntimeError, match="twice"):
        staging.release()
    again.release()


@pytest.mark.parametrize("same_turn", [True, False])
async def test_a_cancelled_wait_takes_nothing(pool: StagingBuffers, same_turn: bool):
    a, b = await pool.acquire(), await pool.acquire()
    waiting = asyncio.create_task(pool.acquire())
    await asyncio.sleep(0)
    if same_turn:
        a.release()
        waiting.cancel()
    else:
        waiting.cancel()
        await asyncio.sleep(0)
        a.release()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    pool.check_integrity()
    assert pool.free == 1
    (await pool.acquire()).release()
    b.release()


async def test_the_allocator_can_be_replaced():
    made = []

    def allocate(nbytes: int) -> bytearray:
        made.append(bytearray(nbytes))
        return made[-1]

    pool = StagingBuffers(3, 64, allocate)
    with await pool.acquire() as staging:
        staging.view[:4] = b"abcd"
    assert len(made) == 3
    assert any(buffer[:4] == b"abcd" for buffer in made)


@pytest.mark.parametrize(("count", "nbytes"), [(0, 1), (1, 0)])
def test_an_empty_pool_is_refused(count: int, nbytes: int):
    with pytest.raises(ValueError, match="some size"):
        StagingBuffers(count, nbytes)
