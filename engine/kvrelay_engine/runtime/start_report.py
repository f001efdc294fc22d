"""Tells the routers how far a worker is that can't take work yet.

Somebody may be waiting for exactly this worker. The report is a courtesy: whatever becomes of it, the
start goes on.
"""

import threading
import time
from collections.abc import Iterator
from typing import Self

import grpc

from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_engine.runtime.join import JoinTls
from kvrelay_engine.runtime.join_tls import join_tls
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc as rpc
from kvrelay_protocol.versions import JOIN_VERSION

REDIAL_S = 0.5
MIN_PAUSE_S = 0.1
"""Between two messages: what happens meanwhile is told by the next one."""


class StartReport:
    """One call for each router, on threads of their own: start-up itself keeps the main thread busy.

    Use it as a context manager around the start; `close` may come earlier, when the worker has joined.
    """

    def __init__(self, config: WorkerConfig, role: pb.Role, *, begun: float) -> None:
        """Args: `begun` is when the process started, by the monotonic clock.

        Raises:
            UsageError: the TLS files can't be used.
        """
        self._routers = config.routers
        self._tls = join_tls(config)
        self._begun = begun
        self._latest = pb.Starting(
            protocol_version=JOIN_VERSION,
            worker_name=config.name,
            role=role,
            model=config.model_name,
            join_token=config.join_token,
            phase="import",
        )
        self._version = 0
        self._closed = False
        self._calls: list[grpc.Call] = []
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        for router in self._routers:
            threading.Thread(
                target=self._tell, args=(router,), name="start report", daemon=True
            ).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """What the worker does now; `done` of `total` bytes where the phase counts them."""
        with self._changed:
            self._latest.phase, self._latest.done, self._latest.total = name, done, total
            self._version += 1
            self._changed.notify_all()

    def close(self) -> None:
        """End the calls. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            # One that waits for a router that is not there would wait on.
            for call in self._calls:
                call.cancel()  # type: ignore[no-untyped-call]

    def _tell(self, router: str) -> None:
        while not self._closed:
            try:
                with dial(router, self._tls) as channel:
                    call = rpc.FleetStub(channel).Join(self._messages(), wait_for_ready=True)
                    if not self._keep(call):
                        return
                    for _ in call:
                        return  # refused: hello will be told why
            except grpc.RpcError:
                pass  # it restarts, or is older than this message
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=REDIAL_S)

    def _keep(self, call: grpc.Call) -> bool:
        """Have `close` end a call. Returns False where it has come already."""
        with self._changed:
            self._calls.append(call)
            return not self._closed

    def _messages(self) -> Iterator[pb.WorkerMessage]:
        told = -1
        while True:
            with self._changed:
                self._changed.wait_for(lambda told=told: self._closed or self._version != told)  # type: ignore[misc]
                if self._closed:
                    return
                told = self._version
                message = pb.WorkerMessage(starting=self._latest)
            message.starting.elapsed_seconds = time.monotonic() - self._begun
            yield message
            time.sleep(MIN_PAUSE_S)


def dial(router: str, tls: JoinTls | None) -> grpc.Channel:
    """A blocking channel: there is no event loop yet."""
    if tls is None:
        return grpc.insecure_channel(router)
    options = (("grpc.ssl_target_name_override", tls.name),) if tls.name else ()
    return grpc.secure_channel(router, tls.credentials, options=options)
