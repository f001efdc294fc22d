"""A UCX worker driven by one asyncio loop: no thread, no polling while idle.

The loop watches the worker's event descriptor. When it fires, UCX is progressed until it has
nothing left or a time budget is spent, finished requests are reported, and the worker is armed
again; UCX refuses to arm while events are pending, in which case another turn follows. While KV is
under way it is not armed before nothing has moved for a moment: see `_LINGER_S`.

What had to be worked around, in the binding (0.52) and in UCX (1.21):

- `ucp_request_cancel` does nothing to sends, nor to receives that have been matched. Whoever needs
  a confirmed cancel has to wait for `Op.done`; see `ucx.py` for how the wait is bounded.
- `UCXRequest.__dealloc__` cancels without waiting, so a request is referenced until it is complete.
- A received message's length is not reported: our own headers carry it.
- The worker's destructor receives every unexpected message to its end, into memory of the size the
  sender announced. A sender that stands still would hang the exit: `close` takes them out first.
- Closing an endpoint by force while it sends ties endpoint, requests and worker together for good
  (`close_blocking` files the sends as "canceling" and never takes them out), and the other way,
  `close`, sets the force flag without the bit that makes UCX read it: it waits for the peer. So
  `close` destroys such a worker through UCX's own call and leaks the binding's empty shell.
- `progress_once` leaves the binding's scheduled cancels undone, `progress` does them.
- One call of `progress_once` may push everything that was posted for sending (47 ms for 64 MiB on
  loopback), so big messages have to be posted in pieces.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any

from kvrelay_protocol.errors import PeerLost, TransportMisconfigured

logger = logging.getLogger(__name__)

_TURN_BUDGET_S = 0.001
"""Time UCX gets before the loop's other callbacks have their turn."""
_EVENTS_PER_REPORT = 16
"""Looking for finished requests costs about as much as one event."""
_LINGER_S = 0.0002
"""How long after the last event of a KV message another is waited for without sleeping. On a virtual
machine a sleep and a wake cost 0.1 to 0.4 ms, as much as a full socket buffer takes to drain: asleep in
between, loopback gave 0.6 to 2.5 GB/s, awake 2.1 to 2.5. The loop's other callbacks have their turns."""
_SMALL_BYTES = 8192
"""Control messages fit; a longer buffer is a piece of KV."""
_SAFETY_PERIOD_S = 0.2
"""Progress is made this often even if no event says so: some UCX transports raise none."""
_SELF_TEST_S = 5.0
_CLOSE_S = 2.0
_RESOURCE = re.compile(r"resource \d+\s.*-- (\S+)")
_LANE = re.compile(r"lane\[\d+\]:\s+\d+:(\S+?)(?:\.\d+)?\s")


def _keep_forever(thing: Any) -> None:
    """Never destruct an object of the binding, not even at exit: its destructor would do harm."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def load_ucx() -> Any:
    """Import the binding's low-level module, quietly.

    Raises:
        ImportError: ucxx is not installed or does not load.
    """
    # UCX prints warnings and errors to stdout; ours are exceptions. Read once, at load.
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    import ucxx._lib.libucxx as api

    return api


class _Native:
    """The few calls the binding lacks, into the libraries it has loaded already."""

    def __init__(self) -> None:
        try:
            ucxx, ucp = ctypes.CDLL("libucxx.so"), ctypes.CDLL("libucp.so.0")
            # void ucxx::Request::cancel(): the binding calls it from a destructor only.
            self.cancel = getattr(ucxx, "_ZN4ucxx7Request6cancelEv")  # noqa: B009 - mangled name
            self._print_info = ucp.ucp_ep_print_info
            self._print_context = ucp.ucp_context_print_info
            self._destroy, self._cleanup = ucp.ucp_worker_destroy, ucp.ucp_cleanup
        except (OSError, AttributeError) as error:
            raise TransportMisconfigured(
                f"this ucxx lacks a call that kvrelay needs ({error}); install ucxx-cu13 0.52"
            ) from error
        self.cancel.argtypes, self.cancel.restype = [ctypes.c_void_p], None
        self._print_info.argtypes, self._print_info.restype = [ctypes.c_void_p] * 2, None
        self._print_context.argtypes, self._print_context.restype = [ctypes.c_void_p] * 2, None
        self._destroy.argtypes, self._destroy.restype = [ctypes.c_void_p], None
        self._cleanup.argtypes, self._cleanup.restype = [ctypes.c_void_p], None
        self._libc = ctypes.CDLL(None)
        self._libc.open_memstream.restype = ctypes.c_void_p
        self._libc.fclose.argtypes = [ctypes.c_void_p]
        self._libc.free.argtypes = [ctypes.c_void_p]

    def destroy(self, worker: Any, context: Any) -> None:
        """Give back what a worker holds although the binding's objects can't be freed any more."""
        fd = worker.epoll_file_descriptor
        _keep_forever(worker)
        _keep_forever(context)
        self._destroy(worker.handle)
        self._cleanup(context.handle)
        os.close(fd)

    def lanes(self, handle: int) -> str:
        """The transports of an endpoint, such as "tcp/eth0", joined by "+" where several."""
        return "+".join(dict.fromkeys(_LANE.findall(self._printed(self._print_info, handle))))

    def resources(self, context: int) -> list[str]:
        """What a context may use, such as "tcp/eth0"."""
        return _RESOURCE.findall(self._printed(self._print_context, context))

    def _printed(self, print_info: Callable[[int, Any], None], handle: int) -> str:
        text, size = ctypes.c_void_p(), ctypes.c_size_t()
        stream = self._libc.open_memstream(ctypes.byref(text), ctypes.byref(size))
        print_info(handle, stream)
        self._libc.fclose(stream)
        info = ctypes.string_at(text, size.value).decode(errors="replace")
        self._libc.free(text)
        return info


class Op:
    """A posted request. Its buffer belongs to UCX until `done`."""

    __slots__ = ("_keep", "_native", "_on_done", "_request", "done", "endpoint", "nbytes")

    def __init__(
        self,
        request: Any,
        keep: memoryview,
        on_done: Callable[[Exception | None], None],
        native: _Native,
        endpoint: "Endpoint | None" = None,
    ) -> None:
        self.done = False
        self.endpoint = endpoint
        self.nbytes = keep.nbytes
        self._request = request
        self._keep: memoryview | None = keep
        self._on_done = on_done
        self._native = native

    @property
    def completed(self) -> bool:
        return bool(self._request.completed)

    def cancel(self) -> None:
        """Ask UCX to cancel; `on_done` confirms. Does nothing to sends and matched receives."""
        if not self.done:
            self._native.cancel(self._request.ucxx_ptr)

    def finish(self) -> None:
        """Report a completed request to whoever posted it."""
        error: Exception | None = None
        try:
            self._request.check_error()
        except Exception as failure:
            error = failure.with_traceback(None)
        self.done = True
        self._request = self._keep = None
        self._on_done(error)


class Endpoint:
    """A connection to one remote worker, with peer error handling."""

    def __init__(self, handle: Any, native: _Native) -> None:
        self.handle = handle
        self._native = native

    @property
    def alive(self) -> bool:
        return self.handle is not None and bool(self.handle.alive)

    @property
    def lanes(self) -> str:
        return self._native.lanes(self.handle.handle) if self.alive else ""

    def detach(self) -> Any:
        """Take the binding's endpoint out, to close it; afterwards this one is not alive."""
        handle, self.handle = self.handle, None
        return handle


class UcxWorker:
    """Owns context, worker, requests and the loop's reader. `on_turn` runs after every progress."""

    def __init__(self, config: dict[str, str], on_turn: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_turn = on_turn
        self._ops: list[Op] = []
        self._turn: asyncio.Handle | None = None
        self._moved_at = 0.0
        self._closed = False
        self._entangled = False
        """A connection was dropped while it was sending; see the module."""
        self._api = load_ucx()
        from ucxx._lib.arr import Array
        from ucxx.types import Tag, TagMask

        self._array, self._tag, self._any_tag = Array, Tag, TagMask(0)
        self.native = _Native()
        features = (self._api.Feature.TAG, self._api.Feature.WAKEUP)
        self._context = self._api.UCXContext(config, features)
        self._worker = self._api.UCXWorker(self._context, False, False)
        self._worker.init_blocking_progress_mode()
        self._fd: int = self._worker.epoll_file_descriptor
        self._loop.add_reader(self._fd, self._progress)
        self._safety = self._loop.call_later(_SAFETY_PERIOD_S, self._on_safety)

    @property
    def resources(self) -> list[str]:
        """The transports and devices that UCX has opened, such as "tcp/eth0"."""
        return self.native.resources(self._context.handle)

    @property
    def address(self) -> bytes:
        return bytes(self._worker.address.tobytes())

    def connect(self, address: bytes) -> Endpoint:
        """Open an endpoint; the connection itself is made by later progress.

        Raises:
            PeerLost: the address is malformed, or no transport leads there.
        """
        return self._endpoint(self._worker, address)

    def _endpoint(self, worker: Any, address: bytes) -> Endpoint:
        try:
            remote = self._api.UCXAddress.create_from_buffer(address)
            handle = worker.create_endpoint_from_worker_address(remote, True)
        except Exception as error:
            raise PeerLost(f"UCX can't reach the peer: {error}") from error
        return Endpoint(handle, self.native)

    def send(
        self,
        endpoint: Endpoint,
        tag: int,
        view: memoryview,
        on_done: Callable[[Exception | None], None],
    ) -> Op:
        """Post a send. `on_done` is called from a later turn, never from here."""
        request = endpoint.handle.tag_send(self._array(view), self._tag(tag))
        return self._post(Op(request, view, on_done, self.native, endpoint))

    def receive(
        self, tag: int, view: memoryview, on_done: Callable[[Exception | None], None]
    ) -> Op:
        """Post a receive. `on_done` is called from a later turn, never from here."""
        request = self._worker.tag_recv(self._array(view), self._tag(tag))
        return self._post(Op(request, view, on_done, self.native))

    def disconnect(self, endpoint: Endpoint) -> None:
        """Drop a connection at once; what is under way on it completes with an error."""
        handle = endpoint.detach()
        if handle is None:
            return
        self._entangled = self._entangled or any(
            op.endpoint is endpoint and not op.completed for op in self._ops
        )
        handle.close_blocking()
        self.kick()

    def _post(self, op: Op) -> Op:
        self._ops.append(op)
        self.kick()
        return op

    def kick(self) -> None:
        """Ask for a turn: something was posted or cancelled."""
        if self._turn is None and not self._closed:
            self._turn = self._loop.call_soon(self._progress)

    def _on_safety(self) -> None:
        self._safety = self._loop.call_later(_SAFETY_PERIOD_S, self._on_safety)
        self.kick()

    def _progress(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self._closed:
            return
        began = time.monotonic()
        while self._advance() | self._report():
            self._moved_at = time.monotonic()
            if self._moved_at > began + _TURN_BUDGET_S:
                self.kick()
                break
        else:
            self._worker.progress()
            self._report()
        self._on_turn()
        if not self._closed:
            self._rest()

    def _rest(self) -> None:
        """Let the loop sleep until UCX's next event, unless that is there or about to come."""
        if self._lingers():
            os.sched_yield()  # the peer may be waiting for this core
            self.kick()
        elif self._turn is None and not self._worker.arm():
            self.kick()

    def _lingers(self) -> bool:
        """Whether the next event of a KV message is about to come."""
        if time.monotonic() > self._moved_at + _LINGER_S:
            return False
        return any(op.nbytes > _SMALL_BYTES for op in self._ops)

    def _advance(self) -> bool:
        """Let UCX handle some events; each is a few tens of kilobytes on TCP."""
        for events in range(_EVENTS_PER_REPORT):
            if not self._worker.progress_once():
                return events > 0
        return True

    def _report(self) -> bool:
        """Finish what UCX has completed, in the order in which it was posted."""
        completed: list[Op] = []
        pending: list[Op] = []
        for op in self._ops:
            (completed if op.completed else pending).append(op)
        self._ops = pending
        for op in completed:
            op.finish()
        return bool(completed)

    async def self_test(self) -> str:
        """Pass one message through a second worker; return the transports UCX chose.

        Raises:
            TransportMisconfigured: no transport with peer error handling is left, or it is stuck.
        """
        other = self._api.UCXWorker(self._context, False, False)
        try:
            endpoint = self._endpoint(self._worker, bytes(other.address.tobytes()))
        except PeerLost as error:
            raise TransportMisconfigured(str(error)) from error
        sent, got, tag = memoryview(b"kvrelay!"), bytearray(8), self._tag(0)
        requests = [endpoint.handle.tag_send(self._array(sent), tag)]
        requests.append(other.tag_recv(self._array(memoryview(got)), tag))
        deadline = time.monotonic() + _SELF_TEST_S
        while not all(request.completed for request in requests):
            if time.monotonic() > deadline or not endpoint.alive:
                endpoint.detach().close_blocking()
                raise TransportMisconfigured("a message to this process itself does not arrive")
            self._worker.progress_once()
            other.progress_once()
            await asyncio.sleep(0)
        lanes = endpoint.lanes
        endpoint.detach().close_blocking()
        del requests
        return lanes

    def close(self) -> None:
        """Give everything back to the system. Endpoints must be closed and dropped before.

        Requests that are still posted are cancelled; `on_done` is called for all of them.
        """
        if self._closed:
            return
        for op in self._ops:
            op.cancel()
        deadline = time.monotonic() + _CLOSE_S
        while self._ops and time.monotonic() < deadline:
            self._worker.progress()
            self._report()
        if self._ops:
            # Their buffers can't be called free: keep them, with the requests, until exit.
            logger.error("%d UCX requests never completed; their buffers are kept", len(self._ops))
            for op in self._ops:
                _keep_forever(op)
        self._closed = True
        self._loop.remove_reader(self._fd)
        self._safety.cancel()
        if self._turn is not None:
            self._turn.cancel()
        self._empty_queue()
        if self._entangled and not self._ops:
            self.native.destroy(self._worker, self._context)
        self._ops = []
        # In this order: the context outlives its worker.
        self._worker = None
        self._context = None

    def _empty_queue(self) -> None:
        """Take unexpected messages out, so that the worker's destructor has none to wait for."""
        while True:
            found = self._worker.tag_probe(self._tag(0), self._any_tag, remove=True)
            if not found.matched:
                return
            if found.length > 8191:
                # A rendezvous: receiving it could wait for ever, freeing it unreceived logs a
                # warning to the terminal. Keeping it costs 100 bytes.
                _keep_forever(found)
                continue
            scratch = bytearray(max(found.length, 1))
            request = self._worker.tag_recv_with_handle(self._array(scratch), found)
            with contextlib.suppress(Exception):
                request.check_error()
