"""UCX without anything of ours: tag messages through ucxx's own API, between two processes.

`python -m kvrelay_bench.transfer.plain` reads `{"sizes": [...], "config": {...}, "sleeps": false}` and
prints `{"gb_per_s": {size: rate}, "latency_us": ...}`. The next message is posted while one is under
way, and the receives are posted before: the pattern of `kvrelay_transfer.probe`. Both processes poll,
as UCX's own benchmark does, or sleep while nothing happens, as a worker must that shares its cores: then
the difference to our transport is framing, event loop and flow control alone.
"""

import json
import os
import select
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvrelay_transfer.probe import messages_per_round
from kvrelay_transfer.staging import page_aligned
from kvrelay_transfer.ucx_worker import load_ucx

_PING, _PONG, _DATA, _ACK = 1, 2, 3, 4
_PINGS, _WARM_PINGS, _PING_BYTES = 200, 20, 4096
_ROUNDS = 3
_LIMIT_S = 150.0
_LONGEST_SLEEP_S = 0.2


class _Posted(NamedTuple):
    """A request and its buffer, which UCX uses until the request is complete."""

    request: Any
    buffer: memoryview


class _Plain:
    """A worker, an endpoint, and waiting by polling or asleep."""

    def __init__(self, config: dict[str, str], *, sleeps: bool) -> None:
        api = load_ucx()
        from ucxx._lib.arr import Array
        from ucxx.types import Tag

        self._api, self._array, self._tag = api, Array, Tag
        # WAKEUP as our transport has it: it excludes some UCX transports.
        self._context = api.UCXContext(config, (api.Feature.TAG, api.Feature.WAKEUP))
        self._worker = api.UCXWorker(self._context, False, False)
        self._endpoint: Any = None
        self._asleep: select.epoll | None = None
        if sleeps:
            self._worker.init_blocking_progress_mode()
            self._asleep = select.epoll()
            self._asleep.register(self._worker.epoll_file_descriptor, select.EPOLLIN)
        self._deadline = time.monotonic() + _LIMIT_S

    @property
    def address(self) -> bytes:
        return bytes(self._worker.address.tobytes())

    def connect(self, address: bytes) -> None:
        remote = self._api.UCXAddress.create_from_buffer(address)
        self._endpoint = self._worker.create_endpoint_from_worker_address(remote, True)

    def send(self, tag: int, buffer: memoryview) -> _Posted:
        return _Posted(self._endpoint.tag_send(self._array(buffer), self._tag(tag)), buffer)

    def receive(self, tag: int, buffer: memoryview) -> _Posted:
        return _Posted(self._worker.tag_recv(self._array(buffer), self._tag(tag)), buffer)

    def wait(self, posted: _Posted) -> None:
        """Poll until a request is complete.

        Raises:
            TimeoutError: nothing moved for too long.
        """
        while not posted.request.completed:
            self._poll()
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"plain UCX did not end within {_LIMIT_S:g} s")
        posted.request.check_error()

    def progress(self) -> None:
        """Poll until the time is up or the process ends."""
        while time.monotonic() < self._deadline:
            self._poll()

    def _poll(self) -> None:
        if self._worker.progress_once():
            return
        if self._asleep is None:
            os.sched_yield()  # the other process may be waiting for this core
        elif self._worker.arm():
            self._asleep.poll(_LONGEST_SLEEP_S)


def _ask(plain: _Plain, sizes: Sequence[int]) -> dict[str, Any]:
    small, trips = _touched(_PING_BYTES), []
    for _ in range(_WARM_PINGS + _PINGS):
        began = time.perf_counter()
        pong = plain.receive(_PONG, small)
        plain.wait(plain.send(_PING, small))
        plain.wait(pong)
        trips.append(time.perf_counter() - began)
    latency_us = statistics.median(trips[_WARM_PINGS:]) / 2 * 1e6
    return {"gb_per_s": {s: _throughput(plain, s) for s in sizes}, "latency_us": latency_us}


def _throughput(plain: _Plain, size: int) -> float:
    buffer, rates = _touched(size), []
    count = messages_per_round(size)
    for _ in range(_ROUNDS):
        ack = plain.receive(_ACK, _touched(1))
        began = time.perf_counter()
        under_way: list[_Posted] = []
        for _ in range(count):
            under_way.append(plain.send(_DATA, buffer))
            if len(under_way) == 2:
                plain.wait(under_way.pop(0))
        for posted in under_way:
            plain.wait(posted)
        plain.wait(ack)
        rates.append(count * size / (time.perf_counter() - began) / 1e9)
    return statistics.median(rates)


def _answer(plain: _Plain, sizes: Sequence[int]) -> None:
    small = _touched(_PING_BYTES)
    for _ in range(_WARM_PINGS + _PINGS):
        plain.wait(plain.receive(_PING, small))
        plain.wait(plain.send(_PONG, small))
    for size in sizes:
        buffers = [_touched(size), _touched(size)]
        for _ in range(_ROUNDS):
            receives = [plain.receive(_DATA, buffer) for buffer in buffers]
            for i in range(messages_per_round(size)):
                plain.wait(receives[i % 2])
                if i + 2 < messages_per_round(size):
                    receives[i % 2] = plain.receive(_DATA, buffers[i % 2])
            plain.wait(plain.send(_ACK, small[:1]))


def _touched(size: int) -> memoryview:
    buffer = memoryview(page_aligned(size))
    buffer[:] = bytes(size)
    return buffer[:size]


def _parent(order: dict[str, Any]) -> None:
    plain = _Plain(order["config"], sleeps=order["sleeps"])
    command = [sys.executable, "-m", "kvrelay_bench.transfer.plain", "--child"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("the child has no pipes")
        try:
            child.stdin.write(json.dumps({**order, "peer": plain.address.hex()}) + "\n")
            child.stdin.flush()
            plain.connect(bytes.fromhex(json.loads(child.stdout.readline())["address"]))
            print(json.dumps(_ask(plain, order["sizes"])), flush=True)
        finally:
            child.kill()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def _child() -> None:
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    plain = _Plain(order["config"], sleeps=order["sleeps"])
    plain.connect(bytes.fromhex(order["peer"]))
    print(json.dumps({"address": plain.address.hex()}), flush=True)
    _answer(plain, order["sizes"])
    plain.progress()  # the last message is under way until the parent has it


def main(arguments: Sequence[str]) -> int:
    """Run one side, and leave without the binding's destructors: they may wait for the other side."""
    status = 1
    try:
        if list(arguments) == ["--child"]:
            _child()
        else:
            _parent(json.loads(sys.stdin.readline()))
        status = 0
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
