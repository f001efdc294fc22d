"""A process with one side of transfers, told over a pipe what to do; survivor and victim alike.

```
driver ── Receive(death?) ─► receiver        driver ── Send(lease) ─────► sender
driver ◄─ Granted ────────── receiver        driver ── Resend, Release ─► sender
driver ◄─ Killed, Ended ──── receiver        driver ◄─ Ended ──────────── sender
                 driver ── PeerDied ─► either: what the router would say
```

A transfer's bytes can be seen where they arrive, so the receiver is who kills: itself, or the sender by
its process id, once the byte it was told of has been written.
"""

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil

from kvrelay_chaos.transfers.arrivals import Arrivals
from kvrelay_chaos.transfers.side import Shape, Side, outcome_of
from kvrelay_engine.cache.allocator import Allocation
from kvrelay_prefill.sender import KvSender
from kvrelay_protocol.errors import KvrelayError
from kvrelay_transfer.lease import OpenLease
from kvrelay_transfer.transport import create_transport

_LOOK_S = 0.00002


@dataclass(frozen=True, slots=True)
class Death:
    """Who is to die, and when."""

    pid: int
    """0: the receiver itself."""
    after_bytes: int
    """Of the transfer: headers, KV and record, in the order in which they arrive."""


@dataclass(frozen=True, slots=True)
class Receive:
    """Take a transfer."""

    death: Death | None = None


@dataclass(frozen=True, slots=True)
class Granted:
    """The lease, ready for a sender."""

    lease: OpenLease


@dataclass(frozen=True, slots=True)
class Send:
    """Send a transfer into a lease."""

    lease: OpenLease


@dataclass(frozen=True, slots=True)
class Release:
    """The receiver has everything."""


@dataclass(frozen=True, slots=True)
class Resend:
    """The receiver misses these."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PeerDied:
    """The control plane's word: nobody is on the other end any more."""


@dataclass(frozen=True, slots=True)
class Killed:
    """Said by the receiver right before the kill."""

    at: float
    """`time.monotonic`, which is the same for all processes of a machine."""
    bytes_seen: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A transfer is over and its blocks are given back."""

    error: str
    """Name of the error's class; empty for a whole transfer."""
    typed: bool
    """A `KvrelayError`, or the cancel that `PeerDied` asked for."""
    digest: str
    """Of the blocks sent or received; empty if it failed."""
    back_at: float
    """`time.monotonic` when blocks and staging buffers were back."""
    leaks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """The transport has started."""

    address: bytes


@dataclass(frozen=True, slots=True)
class Look:
    """Ask for `Held`."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds now."""

    descriptors: int
    threads: int
    leaks: tuple[str, ...]


def run_party(pipe: Connection, shape: Shape, uri: str, seed: int) -> None:
    """Serve orders until the pipe ends: the main function of a child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve(pipe, shape, uri, seed))


async def _serve(pipe: Connection, shape: Shape, uri: str, seed: int) -> None:
    side = await Side.start(shape, create_transport(uri), staging_count=1, seed=seed)
    party = _Party(side, pipe)
    pipe.send(Ready(side.kit.transport.address))
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            while pipe.poll():
                party.obey(pipe.recv())
        except EOFError:
            loop.remove_reader(pipe.fileno())
            if not party.over.done():
                party.over.set_result(None)

    loop.add_reader(pipe.fileno(), read)
    try:
        await party.over
    finally:
        await side.kit.transport.abort()


class _Party:
    """One transfer at a time."""

    def __init__(self, side: Side, pipe: Connection) -> None:
        self._side = side
        self._pipe = pipe
        self._lock = threading.Lock()
        self._sender: KvSender | None = None
        self._task: asyncio.Task[Any] | None = None
        self._transfer: asyncio.Task[None] | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """When nobody orders any more; fails with a defect of ours."""

    def obey(self, order: object) -> None:
        match order:
            case Receive(death):
                self._begin(self._receive(death))
            case Send(lease):
                self._begin(self._send(lease))
            case Release() if self._sender is not None:
                self._sender.release()
            case Resend(numbers) if self._sender is not None:
                self._sender.resend(list(numbers))
            case PeerDied() if self._task is not None:
                self._task.cancel()
            case Look():
                gc.collect()
                me = psutil.Process()
                leaks = tuple(self._side.leaks())
                self._say(Held(me.num_fds(), me.num_threads(), leaks))
            case _:
                pass  # the transfer it concerns has ended

    def _begin(self, transfer: Coroutine[Any, Any, None]) -> None:
        self._transfer = asyncio.create_task(transfer)
        self._transfer.add_done_callback(self._check)

    def _check(self, transfer: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if transfer.cancelled() else transfer.exception()
        if error is not None and not self.over.done():
            self.over.set_exception(error)

    def _say(self, report: object) -> None:
        with self._lock:  # the thread that watches reports too
            self._pipe.send(report)

    async def _send(self, lease: OpenLease) -> None:
        allocation = self._side.take(leased=False)
        self._side.refill(allocation)
        sender = self._sender = self._side.sender(allocation)
        sender.open(lease)
        self._task = asyncio.create_task(sender.run())
        error = await outcome_of(self._task)
        self._sender = None
        self._end(allocation, error)

    async def _receive(self, death: Death | None) -> None:
        allocation = self._side.take(leased=True)
        over, watched = threading.Event(), asyncio.Event()
        told = asyncio.get_running_loop().call_soon_threadsafe

        def watch(death: Death) -> None:
            self._watch(death, over)
            told(watched.set)

        receiver = self._side.receiver(
            allocation,
            lambda lease: self._say(Granted(lease)),
            lambda numbers: self._say(Resend(numbers)),
        )
        if death is not None:
            threading.Thread(target=watch, args=(death,), name="watch").start()
        self._task = asyncio.create_task(receiver.run())
        error = await outcome_of(self._task)
        over.set()
        if death is not None:
            await watched.wait()
        self._end(allocation, error)

    def _watch(self, death: Death, over: threading.Event) -> None:
        """Kill as soon as that many bytes are here, or the transfer has ended without them."""
        arrivals = Arrivals(self._side)
        while not arrivals.reached(death.after_bytes) and not over.is_set():
            time.sleep(_LOOK_S)
        with self._lock:
            self._pipe.send(Killed(time.monotonic(), arrivals.count()))
            os.kill(death.pid or os.getpid(), signal.SIGKILL)

    def _end(self, allocation: Allocation, error: BaseException | None) -> None:
        self._task = None
        digest = self._side.digest(allocation) if error is None else ""
        self._side.allocator.release(allocation.blocks)
        back_at = time.monotonic()
        typed = error is None or isinstance(error, KvrelayError | asyncio.CancelledError)
        name = "" if error is None else type(error).__name__
        self._say(Ended(name, typed, digest, back_at, tuple(self._side.leaks())))
