"""A whole stack as processes: routers, workers with agents in them, a proxy in every Join stream.

It starts what ends, at once, and knows of every end whether it was asked for.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import httpx

from kvrelay_chaos.agents import Agents
from kvrelay_chaos.proxy import JoinProxy
from kvrelay_chaos.shape import Shape, link_name
from kvrelay_infra.forking import ForkServer
from kvrelay_infra.host import free_port
from kvrelay_infra.process import ChildProcess, ChildSpec
from kvrelay_protocol.errors import WorkerStartFailed

HOST = "127.0.0.1"
_START_S = 120.0
_STOP_S = 30.0
_RESTART_S = 0.05
_POLL_S = 0.05
_LOG_LINES = 400


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that ended although nobody had asked for it."""

    name: str
    status: int
    last_lines: Sequence[str]

    def __str__(self) -> str:
        how = signal.Signals(-self.status).name if self.status < 0 else f"exit code {self.status}"
        return "\n".join(
            [f"{self.name} ended by itself: {how}", *(f"  {x}" for x in self.last_lines)]
        )


class Process:
    """One place in the stack and the process that fills it at the moment. Started again when it ends."""

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        environment: Mapping[str, str],
        forks: ForkServer,
        on_unasked: Callable[[Ended], None],
    ) -> None:
        """Args: `command` is asked before every start; `on_unasked` hears of ends nobody asked for."""
        self.name = name
        self.restarts = 0
        self._command = command
        self._environment = environment
        self._forks = forks
        self._on_unasked = on_unasked
        self._loop = asyncio.get_running_loop()
        self._child: ChildProcess | None = None
        self._asked = False
        self._closing = False
        self._ended = asyncio.Event()
        self.log: deque[str] = deque(maxlen=_LOG_LINES)

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        spec = ChildSpec(self.name, self._command(), self._environment, preloaded=True)
        self._asked = False
        self._ended.clear()
        self._child = ChildProcess(
            spec,
            on_line=lambda _name, line: self.log.append(line),
            on_exit=self._on_exit,
            fork_server=self._forks,
        )

    def kill(self) -> bool:
        """SIGKILL. Returns whether there was a process."""
        return self._signal(signal.SIGKILL, ends=True)

    def terminate(self) -> bool:
        """SIGTERM: it drains and ends. Returns whether there was a process."""
        return self._signal(signal.SIGTERM, ends=True)

    async def pause(self, seconds: float) -> bool:
        """SIGSTOP, and SIGCONT after a while. Returns whether there was a process."""
        child = self._child
        if not self._signal(signal.SIGSTOP):
            return False
        try:
            await asyncio.sleep(seconds)
        finally:
            if self._child is child:
                self._signal(signal.SIGCONT)
        return True

    async def ended(self) -> None:
        """Wait for the end of the process that runs now."""
        await self._ended.wait()

    async def stop(self) -> bool:
        """End it for good. Returns whether SIGTERM was enough."""
        self._closing = True
        if self._child is None:
            return True
        self._signal(signal.SIGCONT)
        self.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._ended.wait()
        except TimeoutError:
            self.kill()
            await self._ended.wait()
            return False
        return True

    def _signal(self, number: signal.Signals, *, ends: bool = False) -> bool:
        if self._child is None or self._child.status is not None:
            return False
        self._asked = self._asked or ends
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child.pid, number)
            return True
        return False

    def _on_exit(self, _name: str, status: int) -> None:
        # From the thread that waits for it.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._after_exit, status)

    def _after_exit(self, status: int) -> None:
        self._child = None
        self._ended.set()
        if not self._asked and not self._closing:
            self._on_unasked(Ended(self.name, status, list(self.log)[-12:]))
        if not self._closing:
            self.restarts += 1
            self._loop.call_later(_RESTART_S, self._start_again)

    def _start_again(self) -> None:
        if not self._closing:
            self.start()


class Stack:
    """Everything that runs, by name. Use it as an async context manager."""

    def __init__(self, shape: Shape, values: SimpleNamespace, folder: Path) -> None:
        """Args: `values` are settled flags of `kvrelay up`; `folder` takes sockets and files."""
        self.shape = shape
        self.folder = folder
        self.agents = Agents(folder / "agents")
        self.unasked: list[Ended] = []
        self.full_disks: set[str] = set()
        """Workers whose next process finds no space on its disk."""
        self.proxies: dict[str, JoinProxy] = {}
        self._epochs = dict.fromkeys(shape.router_names, 0)
        self.processes: dict[str, Process] = {}
        self._values = values
        self._join_ports = {name: free_port(HOST) for name in shape.router_names}
        self._http_ports = {name: free_port(HOST) for name in shape.router_names}
        self._forks: list[ForkServer] = []
        self._http = httpx.AsyncClient(timeout=2.0)

    def url(self, router: str) -> str:
        return f"http://{HOST}:{self._http_ports[router]}"

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    async def _start(self) -> None:
        await self.agents.start()
        for worker in self.shape.workers:
            for router in self.shape.router_names:
                proxy = JoinProxy(f"{HOST}:{self._join_ports[router]}")
                await proxy.start()
                self.proxies[link_name(worker, router)] = proxy
        from_router = await self._fork_server("kvrelay_chaos.preload:preload_router")
        from_worker = await self._fork_server("kvrelay_chaos.preload:preload_worker")
        environment = self._environment()
        for name in self.shape.router_names:
            self._add(name, self._router_command(name), environment, from_router)
        for name in self.shape.workers:
            self._add(name, partial(self._worker_command, name), environment, from_worker)
        await self.all_up()

    def _add(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        environment: Mapping[str, str],
        forks: ForkServer,
    ) -> None:
        process = Process(name, command, environment, forks, self.unasked.append)
        self.processes[name] = process
        process.start()

    async def _fork_server(self, preload: str) -> ForkServer:
        ready = threading.Event()
        server = ForkServer(preload, self._environment(), on_ready=lambda _usable: ready.set())
        self._forks.append(server)
        await asyncio.to_thread(ready.wait)
        return server

    def _environment(self) -> dict[str, str]:
        from kvrelay.cli.settings import thread_environment

        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        return {**thread_environment(1), "TMPDIR": str(temporary)}

    def _router_command(self, name: str) -> Callable[[], Sequence[str]]:
        from kvrelay.cli.commands.shared import ROUTER_FLAGS
        from kvrelay.cli.flags import to_arguments

        own = SimpleNamespace(
            **vars(self._values)
            | {
                "host": HOST,
                "port": self._http_ports[name],
                "join_host": HOST,
                "join_port": self._join_ports[name],
                "supervised": True,
            }
        )
        arguments = to_arguments(ROUTER_FLAGS, own)
        model = str(self._values.model)
        return lambda: [sys.executable, "-m", "kvrelay.cli", "router", model, *arguments]

    def _worker_command(self, name: str) -> Sequence[str]:
        from kvrelay.cli.commands.shared import WORKER_FLAGS
        from kvrelay.cli.flags import to_arguments

        addresses = [self.proxies[link_name(name, r)].address for r in self.shape.router_names]
        own = SimpleNamespace(
            **vars(self._values) | {"join": ",".join(addresses), "name": name, "threads": 1}
        )
        disk = "full" if name in self.full_disks else "free"
        self.full_disks.discard(name)
        return [
            *(sys.executable, "-m", "kvrelay_chaos.worker", name, str(self.agents.socket), disk),
            *(name.rpartition("-")[0], str(self._values.model)),
            *to_arguments(WORKER_FLAGS, own),
        ]

    # ---- state

    def pids(self) -> dict[str, int]:
        """Process ids of what runs now."""
        return {name: p.pid for name, p in self.processes.items() if p.pid is not None}

    def epoch(self, router: str) -> int:
        """Odd from a router's end until it answers again; another number whenever that changed."""
        return self._epochs[router]

    async def kill_router(self, name: str) -> bool:
        """SIGKILL, and wait until another process answers in its place."""
        process = self.processes[name]
        self._epochs[name] += 1
        try:
            killed = process.kill()
            await process.ended()
            await self.up(name)
        finally:
            self._epochs[name] += 1
        return killed

    async def up(self, name: str) -> None:
        """Wait until a process does its work: a router answers, a worker has joined every live router."""
        while not await self._is_up(name):  # noqa: ASYNC110 - other processes set no event of ours
            await asyncio.sleep(_POLL_S)

    async def all_up(self) -> None:
        """Wait for every process.

        Raises:
            WorkerStartFailed: one of them does not come up; the message has what it printed.
        """
        try:
            async with asyncio.timeout(_START_S):
                for name in (*self.shape.router_names, *self.shape.workers):
                    await self.up(name)
        except TimeoutError:
            reason = f"{name} is not up after {_START_S:g} s; the stack's last lines:"
            raise WorkerStartFailed(f"{reason}\n{self.last_lines()}") from None

    async def _is_up(self, name: str) -> bool:
        if name in self.proxies:
            return self.proxies[name].connected
        process = self.processes[name]
        if process.pid is None:
            return False
        if name in self.shape.router_names:
            return await self._answers(name)
        links = [self.proxies[link_name(name, router)] for router in self.shape.router_names]
        return self.agents.pid(name) == process.pid and all(link.connected for link in links)

    async def _answers(self, router: str) -> bool:
        try:
            await self._http.get(f"{self.url(router)}/health")
        except httpx.HTTPError:
            return False
        return True

    def last_lines(self, count: int = 8) -> str:
        """What every process printed last."""
        return "\n".join(
            f"  [{name}] {line}"
            for name, process in self.processes.items()
            for line in list(process.log)[-count:]
        )

    # ---- the end

    async def stop(self) -> list[str]:
        """End everything. Returns the names of processes that had to be killed."""
        workers = [p for n, p in self.processes.items() if n in self.shape.workers]
        routers = [p for n, p in self.processes.items() if n in self.shape.router_names]
        stubborn: list[str] = []
        for group in (workers, routers):
            ends = await asyncio.gather(*(process.stop() for process in group))
            stubborn += [p.name for p, gently in zip(group, ends, strict=True) if not gently]
        for server in self._forks:
            server.close()
        self._forks.clear()
        await asyncio.gather(*(proxy.stop() for proxy in self.proxies.values()))
        await self.agents.stop()
        await self._http.aclose()
        return stubborn
