"""What the router tells the supervisor over a real socket, and what the supervisor makes of nonsense."""

import asyncio
import queue
import socket
import threading

import pytest

from kvrelay_infra import scale_socket
from kvrelay_infra.scale_socket import ScaleServer, SocketProvider


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scale"


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """However slow the machine is; a test that waits for the limit sets its own."""
    monkeypatch.setattr(scale_socket, "_ANSWER_S", 60.0)


@pytest.fixture
def told(path):
    heard: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    server = ScaleServer(path, lambda pool, replicas: heard.put((pool, replicas)))
    yield heard
    server.close()


def all_of(heard: queue.SimpleQueue) -> list[tuple[str, int]]:
    return [heard.get_nowait() for _ in range(heard.qsize())]


async def test_what_is_told_arrives_in_order_and_before_it_is_answered(path, told):
    provider = SocketProvider(str(path))
    said = [("decode", 1), ("prefill", 1), ("decode", 3), ("prefill", 0), ("decode", 0)]
    for pool, replicas in said:
        await provider.scale(pool, replicas)
    assert all_of(told) == said


@pytest.mark.parametrize(
    "nonsense",
    [
        b"",
        b"\n",
        b"\xff\xfe\n",
        b'{"pool": "decode", "repl',
        b"[]\n",
        b"7\n",
        b"null\n",
        b'"decode"\n',
        b"{}\n",
        b'{"pool": "decode"}\n',
        b'{"pool": "decode", "replicas": null}\n',
        b'{"pool": "decode", "replicas": "many"}\n',
        b'{"pool": "decode", "replicas": [1]}\n',
        b'{"pool": "decode", "replicas": Infinity}\n',
        b'{"pool": "decode", "replicas": -1}\n',
        b'{"pool": 1, "replicas": 1}\n',
        b"[" * 10_000,
        b"x" * 1_000_000,
    ],
    ids=lambda nonsense: repr(nonsense[:40]),
)
async def test_nonsense_is_not_answered_and_does_not_stop_the_server(path, told, nonsense):
    with socket.socket(socket.AF_UNIX) as other:
        other.settimeout(60)
        other.connect(str(path))
        try:
            other.sendall(nonsense)
            other.shutdown(socket.SHUT_WR)
            assert other.recv(100) == b""
        except (BrokenPipeError, ConnectionResetError):
            pass  # it had read enough
    await SocketProvider(str(path)).scale("decode", 1)
    assert all_of(told) == [("decode", 1)]


async def test_one_that_connects_and_says_nothing_is_not_waited_for(path, told, monkeypatch):
    # This one never closes: only the limit ends it, and the provider's own must be the longer one.
    with socket.socket(socket.AF_UNIX) as other:
        monkeypatch.setattr(scale_socket, "_ANSWER_S", 0.05)
        other.settimeout(60)
        other.connect(str(path))
        assert other.recv(100) == b""
        monkeypatch.setattr(scale_socket, "_ANSWER_S", 60.0)
        await SocketProvider(str(path)).scale("decode", 1)
    assert all_of(told) == [("decode", 1)]


async def test_closing_ends_the_thread_and_the_next_one_to_ask_hears_of_it(path):
    before = set(threading.enumerate())
    server = ScaleServer(path, lambda _pool, _replicas: None)
    (thread,) = set(threading.enumerate()) - before
    server.close()
    await asyncio.to_thread(thread.join, 60)
    assert not thread.is_alive()
    with pytest.raises(OSError):
        await SocketProvider(str(path)).scale("decode", 1)
    server.close()  # twice is once


async def test_without_a_socket_there_is_an_error(path):
    with pytest.raises(FileNotFoundError):
        await SocketProvider(str(path)).scale("decode", 1)


async def test_one_that_listens_and_never_answers_is_given_up(path, monkeypatch):
    monkeypatch.setattr(scale_socket, "_ANSWER_S", 0.05)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(path))
        deaf.listen()
        with pytest.raises(TimeoutError):
            await SocketProvider(str(path)).scale("decode", 1)


async def test_one_that_hangs_up_without_an_answer_did_not_hear_it(path):
    async def hang_up(_reader, writer):
        writer.close()

    async with await asyncio.start_unix_server(hang_up, path):
        with pytest.raises(ConnectionError):
            await SocketProvider(str(path)).scale("decode", 1)
