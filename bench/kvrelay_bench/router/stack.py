"""The processes of one measurement: the router, or its floor, on a core of its own, mock workers, a client."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from kvrelay_bench.router.workload import Workload
from kvrelay_infra.host import free_port
from kvrelay_protocol.errors import StartupError
from kvrelay_protocol.model_files import ModelFiles
from kvrelay_router.text.tokenizer import load_tokenizer

_HOST = "127.0.0.1"
_START_S = 30.0
_END_S = 300.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What both sides of the router saw of one workload."""

    client: dict[str, Any]
    workers: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores run what."""

    router: int
    others: tuple[int, ...]

    @classmethod
    def choose(cls, router: int | None) -> "Cores":
        """The router alone on one of ours, everything else on the rest (on a single core: with it)."""
        ours = sorted(os.sched_getaffinity(0))
        router = ours[-1] if router is None else router
        return cls(router, tuple(core for core in ours if core != router) or (router,))


class Stack:
    """A running router; `measure` sends workloads through it, each with mock workers of its own."""

    def __init__(
        self,
        model: ModelFiles,
        table: Sequence[int],
        cores: Cores,
        folder: Path,
        *,
        floor: bool = False,
    ) -> None:
        """Args: with `floor` the router's libraries alone stand in its place."""
        self._model = model
        self._table = list(table)
        self._cores = cores
        self._folder = folder
        self.port, self.join_port = free_port(_HOST), free_port(_HOST)
        self._log = folder / "router.log"
        command = self._floor_command() if floor else self._router_command()
        self.router = self._spawn(command, (cores.router,), self._log)

    def _router_command(self) -> list[str]:
        return [
            *("-m", "kvrelay.cli", "router", str(self._model.directory)),
            *("--served-model-name", self._model.name),
            *("--host", _HOST, "--port", str(self.port)),
            *("--join-host", _HOST, "--join-port", str(self.join_port)),
        ]

    def _floor_command(self) -> list[str]:
        tokenizer = load_tokenizer(self._model.require_tokenizer())
        given = {
            "texts": {token: tokenizer.decode([token]) for token in self._table},
            "model": self._model.name,
            "host": _HOST,
            "port": self.port,
            "join_port": self.join_port,
        }
        return ["-m", "kvrelay_bench.router.floor", json.dumps(given)]

    def measure(self, workload: Workload) -> Seen:
        """Run one workload to its end.

        Raises:
            StartupError: a process of the measurement did not start or failed.
        """
        shared = {
            "workload": asdict(workload),
            "table": self._table,
            "model": self._model.name,
        }
        self._wait_for(workers=0)
        workers_file = self._folder / "workers.json"
        client_file = self._folder / "client.json"
        workers = self._start(
            "mock_workers",
            {**shared, "address": f"{_HOST}:{self.join_port}", "result": str(workers_file)},
        )
        try:
            self._wait_for(workers=2)
            client = self._start(
                "load_client",
                {
                    **shared,
                    "host": _HOST,
                    "port": self.port,
                    "router": self.router.pid,
                    "tokenizer": str(self._model.require_tokenizer()),
                    "result": str(client_file),
                },
            )
            _close_input(client)
            self._finish(client, "load client")
        finally:
            _close_input(workers)
        self._finish(workers, "mock workers")
        return Seen(json.loads(client_file.read_text()), json.loads(workers_file.read_text()))

    def stop(self) -> None:
        self.router.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.router.wait(10)
        self.router.kill()
        self.router.wait()
        _close_input(self.router)

    def _start(self, module: str, given: dict[str, Any]) -> "subprocess.Popen[bytes]":
        arguments = ["-m", f"kvrelay_bench.router.{module}", json.dumps(given)]
        return self._spawn(arguments, self._cores.others, self._folder / f"{module}.log")

    def _spawn(
        self, arguments: list[str], cores: tuple[int, ...], log: Path
    ) -> "subprocess.Popen[bytes]":
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,  # its end is the end of the mock workers
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        # Before its first thread starts: threads inherit it.
        os.sched_setaffinity(process.pid, cores)
        return process

    def _wait_for(self, workers: int) -> None:
        give_up = time.monotonic() + _START_S
        while time.monotonic() < give_up:
            with contextlib.suppress(httpx.TransportError):
                health = httpx.get(f"http://{_HOST}:{self.port}/health?verbose")
                if len(health.json()["workers"]) == workers:
                    return
            if self.router.poll() is not None:
                raise StartupError(f"the router ended: {_tail(self._log)}")
            time.sleep(0.05)
        raise StartupError(f"no {workers} mock workers at the router within {_START_S:g} s")

    def _finish(self, process: "subprocess.Popen[bytes]", what: str) -> None:
        try:
            status = process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise StartupError(f"the {what} did not end within {_END_S:g} s") from None
        if status:
            log = "load_client" if "client" in what else "mock_workers"
            raise StartupError(f"the {what} failed: {_tail(self._folder / f'{log}.log')}")


def _close_input(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


@contextlib.contextmanager
def running_router(
    model: ModelFiles, table: Sequence[int], cores: Cores, *, floor: bool = False
) -> Iterator[Stack]:
    """Start the router process, or its floor's; stop it after the block."""
    with tempfile.TemporaryDirectory(prefix="kvrelay-bench-router-") as folder:
        stack = Stack(model, table, cores, Path(folder), floor=floor)
        try:
            yield stack
        finally:
            stack.stop()
