"""The stack's end of the agents: one socket that all workers dial, and what is still owed of KV faults."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvrelay_chaos.kv_plane import KvOrder

_LINE_BYTES = 1024 * 1024


class AgentLost(Exception):
    """The worker went away before it answered."""


@dataclass(eq=False, slots=True)
class _Connection:
    """A worker's agent, as long as its process lives."""

    pid: int
    writer: asyncio.StreamWriter
    answers: dict[int, "asyncio.Future[Any]"] = field(default_factory=dict)


class Agents:
    """All agents by the names of their workers. A fault that found no message before its worker died is
    ordered from the next process of that name.
    """

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._server: asyncio.Server | None = None
        self._connections: dict[str, _Connection] = {}
        self._numbers = itertools.count(1)
        self._owed: dict[str, dict[int, tuple[KvOrder, asyncio.Future[None]]]] = {}

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.socket, limit=_LINE_BYTES)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections.values()):
            connection.writer.close()

    def pid(self, worker: str) -> int | None:
        """Process id of the worker whose agent is connected."""
        connection = self._connections.get(worker)
        return None if connection is None else connection.pid

    async def ask(self, worker: str, do: str, **arguments: object) -> Any:
        """Give an order, return its result.

        Raises:
            AgentLost: nobody of that name is connected, or it went away.
            RuntimeError: the agent could not do it; the message says why.
        """
        connection = self._connections.get(worker)
        if connection is None:
            raise AgentLost(f"{worker} has no agent now")
        number = next(self._numbers)
        answer = connection.answers[number] = asyncio.get_running_loop().create_future()
        _write(connection.writer, {"id": number, "do": do, **arguments})
        try:
            return await answer
        finally:
            connection.answers.pop(number, None)

    async def kv_fault(self, worker: str, order: KvOrder) -> None:
        """Return when the order has met a message, of this process or of a later one."""
        number = next(self._numbers)
        hit = asyncio.get_running_loop().create_future()
        self._owed.setdefault(worker, {})[number] = (order, hit)
        connection = self._connections.get(worker)
        if connection is not None:
            self._order(connection, number, order)
        try:
            await hit
        finally:
            del self._owed[worker][number]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            hello = json.loads(await reader.readline())
            name, connection = hello["name"], _Connection(hello["pid"], writer)
            self._connections[name] = connection
            for number, (order, _) in self._owed.get(name, {}).items():
                self._order(connection, number, order)
            try:
                while line := await reader.readline():
                    self._receive(name, connection, json.loads(line))
            finally:
                if self._connections.get(name) is connection:
                    del self._connections[name]
                for answer in connection.answers.values():
                    if not answer.done():
                        answer.set_exception(AgentLost(f"{name} went away"))
                writer.close()

    def _receive(self, name: str, connection: _Connection, message: Mapping[str, Any]) -> None:
        if "hit" in message:
            _, hit = self._owed.get(name, {}).get(message["hit"], (None, None))
            if hit is not None and not hit.done():
                hit.set_result(None)
            return
        answer = connection.answers.get(message["id"])
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(RuntimeError(f"{name}: {message['error']}"))
        else:
            answer.set_result(message["result"])

    def _order(self, connection: _Connection, number: int, order: KvOrder) -> None:
        _write(connection.writer, {"id": 0, "do": "kv", "number": number, **asdict(order)})


def _write(writer: asyncio.StreamWriter, message: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        writer.write(json.dumps(message).encode() + b"\n")
