"""The provider for local processes: one router and its workers under one supervisor.

`Supervisor` is the thin shell around `SupervisorMachine`: it owns the processes, the clock and the
signals, turns what happens into events and carries out the actions. `LocalStack` runs one in a thread
for a program that wants to talk to its own stack.
"""

import http.client
import json
import queue
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

from kvrelay_infra.console import Console
from kvrelay_infra.forking import ForkServer, ForkState
from kvrelay_infra.host import accepts_connections
from kvrelay_infra.process import ChildProcess, ChildSpec
from kvrelay_infra.scale_socket import ScaleServer
from kvrelay_infra.supervisor_machine import (
    Action,
    Announce,
    Begin,
    Event,
    Exited,
    Finish,
    GraceOver,
    Health,
    Kill,
    Phase,
    RouterListening,
    ScaleTo,
    Spawn,
    StartGrace,
    StopRequested,
    SupervisorMachine,
    Terminate,
    Wake,
    WakeDue,
)
from kvrelay_protocol.errors import WorkerStartFailed

_PROBE_S = 0.1
_WATCH_S = 1.0
_STILL_WAITING_S = 10.0
_CLOSE_GRACE_S = 10.0
_NAMES_WIDTH = 50
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class LocalFleet:
    """What to run on this machine, and where it answers."""

    router: ChildSpec
    workers: Sequence[ChildSpec]
    http_host: str
    """An address clients on this machine reach; never a wildcard."""
    http_port: int
    join_host: str
    join_port: int
    tls: bool = False
    drain_grace_s: float = 30.0
    scale_socket: Path | None = None
    """Where the router says how many workers it wants; None: all of them, always."""
    running: Mapping[str, int] = field(default_factory=dict)
    """With `scale_socket`: how many workers of each pool run from the start; none of a pool not named."""
    preload: str = ""
    """`module:function` that imports what the preloaded children need; empty: every child does so itself."""
    preload_environment: Mapping[str, str] = field(default_factory=dict)

    def first(self, counts: Mapping[str, int]) -> frozenset[str]:
        """The first so many workers of each pool, by name; a worker's name is its pool's and a number."""
        pools: dict[str, list[str]] = {}
        for spec in self.workers:
            pools.setdefault(spec.name.rpartition("-")[0], []).append(spec.name)
        return frozenset(n for pool, names in pools.items() for n in names[: counts.get(pool, 0)])

    @property
    def base_url(self) -> str:
        host = f"[{self.http_host}]" if ":" in self.http_host else self.http_host
        return f"{'https' if self.tls else 'http'}://{host}:{self.http_port}"


@dataclass(frozen=True, slots=True)
class HealthPage:
    """The router's `/health?verbose=1`, as far as the supervisor needs it."""

    ready: bool
    workers: frozenset[str] | None
    raw: dict[str, Any]


def fetch_health(fleet: LocalFleet, *, timeout_s: float = 2.0) -> HealthPage | None:
    """Ask the router; None while nobody answers."""
    connection: http.client.HTTPConnection
    if fleet.tls:
        # Our own process on this machine; its certificate names the public host.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(
            fleet.http_host, fleet.http_port, timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection(fleet.http_host, fleet.http_port, timeout=timeout_s)
    try:
        connection.request("GET", "/health?verbose=1", headers={"connection": "close"})
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return HealthPage(response.status == http.client.OK, *_parse_health(body))


def _parse_health(body: bytes) -> tuple[frozenset[str] | None, dict[str, Any]]:
    try:
        page = json.loads(body)
    except ValueError:
        return None, {}
    if not isinstance(page, dict):
        return None, {}
    entries = page.get("workers")
    if not isinstance(entries, list):
        return None, page
    names = {entry if isinstance(entry, str) else entry.get("name") for entry in entries if entry}
    return frozenset(name for name in names if isinstance(name, str)), page


@dataclass(frozen=True, slots=True)
class _CanFork:
    """The fork server has preloaded what workers need, or is gone."""


class Supervisor:
    """Runs one fleet until it is stopped or its first start fails. One `run` per instance."""

    def __init__(
        self,
        fleet: LocalFleet,
        console: Console,
        *,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._fleet = fleet
        self._console = console
        self._on_ready = on_ready
        self._specs = {spec.name: spec for spec in (fleet.router, *fleet.workers)}
        console.name_width = max(map(len, self._specs))
        self._replicas = dict(fleet.running)
        wanted = None if fleet.scale_socket is None else fleet.first(self._replicas)
        self._machine = SupervisorMachine(
            fleet.router.name, [spec.name for spec in fleet.workers], wanted
        )
        # SimpleQueue: `put` may run in a signal handler while the same thread is inside `get`.
        self._events: queue.SimpleQueue[Event | _CanFork] = queue.SimpleQueue()
        self._children: dict[str, ChildProcess] = {}
        self._fork_server: ForkServer | None = None
        self._unborn: list[str] = []
        """Children that wait for the fork server."""
        self._timers: dict[str, tuple[float, Event]] = {}
        self._done = threading.Event()
        self._began = time.monotonic()
        self._waiting_since = self._began
        self._interactive = True
        """Ctrl-C reaches us, and not a program that stops its own stack when it has no requests."""

    def run(self, *, handle_signals: bool) -> bool:
        """Start everything, stay until the last child is gone.

        Returns:
            False when a second stop request had to kill children.

        Raises:
            WorkerStartFailed: a child ended before it was ready for the first time.
        """
        self._interactive = handle_signals
        previous = self._install_signals() if handle_signals else {}
        watcher = threading.Thread(target=self._watch, name="health", daemon=True)
        socket = self._fleet.scale_socket
        scaling = None if socket is None else ScaleServer(socket, self._scale)
        try:
            self._preload()
            self._carry_out(self._machine.handle(Begin()))
            watcher.start()
            finish = None
            while finish is None:
                event = self._next_event()
                if isinstance(event, _CanFork):
                    self._start_unborn()
                else:
                    finish = self._carry_out(self._machine.handle(event))
        finally:
            self._done.set()
            if scaling is not None:
                scaling.close()
            if self._fork_server is not None:
                self._fork_server.close()
            # Only after a defect of ours are there any left.
            for child in self._children.values():
                child.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if finish.failed is not None:
            raise self._start_failure(finish.failed)
        return not finish.killed

    def stop(self) -> None:
        """Drain; a second call kills. From any thread or signal handler."""
        self._events.put(StopRequested())

    def pids(self) -> dict[str, int]:
        """Process ids of the children that run."""
        children = self._children.items()
        return {name: child.pid for name, child in children if child.status is None}

    def _scale(self, pool: str, replicas: int) -> None:
        # On the socket's thread, the only one that reads or writes `_replicas` from here on.
        self._replicas[pool] = replicas
        self._events.put(ScaleTo(self._fleet.first(self._replicas)))

    def last_lines(self, count: int) -> list[str]:
        """What each child printed last, with its name."""
        return [
            f"  [{name}] {line}"
            for name, child in self._children.items()
            for line in child.tail(count)
        ]

    def _install_signals(self) -> dict[int, Any]:
        def on_signal(_number: int, _frame: FrameType | None) -> None:
            self.stop()

        previous: dict[int, Any] = {}
        for number in _SIGNALS:
            # nohup asked for exactly this.
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            previous[number] = signal.signal(number, on_signal)
        return previous

    def _preload(self) -> None:
        """Start a fork server, where children can use one and none is there."""
        wanted = self._fleet.preload and any(spec.preloaded for spec in self._fleet.workers)
        if not wanted or sys.platform != "linux":
            return
        if self._fork_server is not None:
            self._fork_server.close()
        self._fork_server = ForkServer(
            self._fleet.preload,
            self._fleet.preload_environment,
            on_ready=lambda _usable: self._events.put(_CanFork()),
        )

    def _next_event(self) -> Event | _CanFork:
        while True:
            now = time.monotonic()
            due = min(self._timers, key=lambda name: self._timers[name][0], default=None)
            if due is not None and self._timers[due][0] <= now:
                return self._timers.pop(due)[1]
            pause = _STILL_WAITING_S if due is None else self._timers[due][0] - now
            try:
                return self._events.get(timeout=min(pause, _STILL_WAITING_S))
            except queue.Empty:
                self._report_waiting()

    def _report_waiting(self) -> None:
        now = time.monotonic()
        if self._machine.phase not in {Phase.ROUTER, Phase.WORKERS}:
            return
        if now - self._waiting_since >= _STILL_WAITING_S:
            self._waiting_since = now
            wanted = (
                [self._fleet.router.name]
                if self._machine.phase is Phase.ROUTER
                else self._machine.missing()
            )
            self._console.line(
                f"  still waiting for {', '.join(wanted)} ({now - self._began:.0f} s)"
            )

    def _carry_out(self, actions: Sequence[Action]) -> Finish | None:
        for action in actions:
            match action:
                case Spawn(name):
                    self._spawn(name)
                case Wake(name, after_s):
                    self._console.line(f"  {name} starts again in {after_s:.0f} s")
                    self._timers[name] = (time.monotonic() + after_s, WakeDue(name))
                case Terminate(name) | Kill(name) if name in self._unborn:
                    self._unborn.remove(name)
                    self._events.put(Exited(name, -signal.SIGTERM, time.monotonic()))
                case Terminate(name):
                    self._children[name].terminate()
                case Kill(name):
                    self._children[name].kill()
                case StartGrace(phase):
                    draining = phase is Phase.DRAINING
                    grace = self._fleet.drain_grace_s if draining else _CLOSE_GRACE_S
                    # The processes hold to the same limit; a little more lets them say so.
                    self._timers[" grace"] = (time.monotonic() + grace + 2.0, GraceOver())
                case Announce(phase):
                    self._announce(phase)
                case Finish():
                    return action
        return None

    def _spawn(self, name: str) -> None:
        if name in self._children:
            again = " again" if self._fleet.scale_socket is None else ""
            self._console.line(f"  {name} starts{again}")
        server = self._fork_server
        if server is not None and server.state is ForkState.LOADING and self._specs[name].preloaded:
            self._unborn.append(name)
            return
        self._children[name] = ChildProcess(
            self._specs[name],
            on_line=self._console.child_line,
            on_exit=self._on_exit,
            fork_server=server,
        )
        if server is not None and server.state is ForkState.GONE:
            self._preload()  # for the next one

    def _start_unborn(self) -> None:
        unborn, self._unborn = self._unborn, []
        for name in unborn:
            self._spawn(name)

    def _on_exit(self, name: str, status: int) -> None:
        asked = status == 0 and self._fleet.scale_socket is not None
        if self._machine.phase in {Phase.WORKERS, Phase.SERVING}:
            what = "ended: not needed" if asked else f"ended: {describe_status(status)}"
            self._console.line(f"  {name} {what}")
        self._events.put(Exited(name, status, time.monotonic()))

    def _announce(self, phase: Phase) -> None:
        now = time.monotonic()
        fleet = self._fleet
        match phase:
            case Phase.WORKERS:
                detail = f"workers join at {fleet.join_host}:{fleet.join_port}"
                self._console.phase("router", detail, seconds=now - self._began)
                self._waiting_since = now
            case Phase.SERVING:
                started = [spec.name for spec in fleet.workers if spec.name in self._children]
                names = " ".join(started)
                if len(names) > _NAMES_WIDTH:
                    names = f"all {len(started)}"
                ready = f"{names} ready" if started else "none runs until a request comes"
                self._console.phase("workers", ready, seconds=now - self._began)
                self._on_ready()
            case Phase.DRAINING if self._interactive:
                self._console.line(
                    f"  draining: open requests have {fleet.drain_grace_s:.0f} s; "
                    "Ctrl-C again stops at once"
                )
            case Phase.KILLING:
                self._console.line(f"  stopping at once: {' '.join(self._machine.alive())}")
            case _:
                pass

    def _watch(self) -> None:
        """Probe the router: quickly until everything serves, then often enough to see restarts."""
        while not accepts_connections(self._fleet.join_host, self._fleet.join_port):
            if self._done.wait(_PROBE_S / 2):
                return
        self._events.put(RouterListening())
        while True:
            page = fetch_health(self._fleet)
            if page is not None:
                self._events.put(Health(page.ready, page.workers, time.monotonic()))
            serving = self._machine.phase is Phase.SERVING and not self._machine.missing()
            if self._done.wait(_WATCH_S if serving else _PROBE_S):
                return

    def _start_failure(self, name: str) -> WorkerStartFailed:
        child = self._children[name]
        status = child.status
        lines = "\n".join(f"  [{name}] {line}" for line in child.tail(12))
        ended = f"{name} ended before it was ready: {describe_status(status)}"
        return WorkerStartFailed(f"{ended}; its last lines:\n{lines}" if lines else ended)


def describe_status(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "not started"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit code {status}"


class LocalStack:
    """A fleet for the length of a `with` block; entering waits until it serves.

    Leaving drains it; Ctrl-C while leaving kills it. Nothing is left behind either way.
    """

    def __init__(self, fleet: LocalFleet, console: Console) -> None:
        self.fleet = fleet
        self._ready = threading.Event()
        self._supervisor = Supervisor(fleet, console, on_ready=self._ready.set)
        self._failure: BaseException | None = None
        # Children die with this thread, so it is the one that starts them and it outlives them.
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    @property
    def base_url(self) -> str:
        return self.fleet.base_url

    def pids(self) -> dict[str, int]:
        return self._supervisor.pids()

    def last_lines(self, count: int) -> list[str]:
        """What each process printed last, with its name."""
        return self._supervisor.last_lines(count)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            while not self._ready.wait(0.05) and self._thread.is_alive():
                pass
            if not self._ready.is_set():
                self._raise_failure()
        except BaseException:
            self._shut_down()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._shut_down()

    def _run(self) -> None:
        try:
            self._supervisor.run(handle_signals=False)
        except BaseException as error:
            self._failure = error

    def _raise_failure(self) -> None:
        raise self._failure or WorkerStartFailed("the stack was stopped before it was ready")

    def _shut_down(self) -> None:
        self._supervisor.stop()
        interrupted: BaseException | None = None
        while self._thread.is_alive():
            try:
                self._thread.join(0.2)
            except BaseException as error:
                # Ctrl-C or SIGTERM while draining: hurry, and still wait for the last child.
                interrupted = error
                self._supervisor.stop()
        if isinstance(interrupted, SystemExit):
            raise interrupted
