import asyncio
import threading
import time

import pytest

from kvrelay import AsyncClient, Client, StreamInterrupted, TextDelta
from kvrelay.testing import FakeServer, delay

ENDLESS = [TextDelta("a"), delay(600)]
FLOOD = [TextDelta("a"), *[TextDelta("a" * 1000)] * 100_000]
"""More than the buffers of any socket hold."""


@pytest.fixture(params=[ENDLESS, FLOOD], ids=["silent", "flooding"])
def endless(request):
    with FakeServer(request.param) as server:
        yield server


def test_leaving_the_stream_cancels_at_the_server(endless):
    with Client(endless.base_url) as client:
        with client.stream("x", model="fake") as stream:
            assert next(stream.text_stream) == "a"
        assert endless.requests[0].client_left()
        assert list(stream) == []


async def test_leaving_the_stream_cancels_at_the_server_async(endless):
    async with AsyncClient(endless.base_url) as client:
        async with client.stream("x", model="fake") as stream:
            assert await anext(stream.text_stream) == "a"
        assert await asyncio.to_thread(endless.requests[0].client_left)
        assert [event async for event in stream] == []


def test_an_exception_in_the_body_cancels_too(endless):
    with Client(endless.base_url) as client:
        with pytest.raises(ZeroDivisionError), client.stream("x", model="fake") as stream:
            next(stream)
            1 / 0  # noqa: B018
        assert endless.requests[0].client_left()


def test_cancel_wakes_a_reader_in_another_thread():
    with FakeServer(ENDLESS) as server, Client(server.base_url) as client:
        with client.stream("x", model="fake") as stream:
            assert next(stream).text == "a"
            threading.Timer(0.2, stream.cancel).start()
            assert list(stream) == []
            with pytest.raises(StreamInterrupted) as caught:
                stream.final()
        assert caught.value.partial == "a"
        assert stream.snapshot == "a"
        assert server.requests[0].client_left()


async def test_cancel_wakes_a_reader_in_another_task():
    with FakeServer(ENDLESS) as server:
        async with AsyncClient(server.base_url) as client:
            async with client.stream("x", model="fake") as stream:
                assert (await anext(stream)).text == "a"
                asyncio.get_running_loop().call_later(
                    0.2, lambda: tasks.append(asyncio.ensure_future(stream.cancel()))
                )
                tasks: list[asyncio.Future[None]] = []
                async with asyncio.timeout(55):
                    assert [event async for event in stream] == []
                await asyncio.gather(*tasks)
            assert await asyncio.to_thread(server.requests[0].client_left)


async def test_a_cancelled_task_cancels_its_stream():
    with FakeServer(ENDLESS) as server:
        async with AsyncClient(server.base_url) as client:

            async def ask() -> None:
                async with client.stream("x", model="fake") as stream:
                    await stream.final()

            task = asyncio.create_task(ask())
            while not server.requests:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.requests[0].client_left)


async def test_a_cancelled_chat_call_leaves():
    with FakeServer(ENDLESS) as server:
        async with AsyncClient(server.base_url) as client:
            task = asyncio.create_task(client.chat("x", model="fake"))
            while not server.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.requests[0].client_left)


def test_no_thread_outlives_its_stream(server):
    with Client(server.base_url) as client:
        for _ in range(5):
            with client.stream("x", model="fake") as stream:
                next(stream)
    deadline = time.monotonic() + 60
    while [t for t in threading.enumerate() if t.name == "kvrelay-deadline"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
