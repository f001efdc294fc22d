"""How a router on this machine tells the supervisor how many workers it wants.

A Unix socket in a folder of its owner; one JSON object a connection:

```
router ──► {"pool": "decode", "replicas": 1}        ──► {"ok": true}
```
"""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path

_LINE_BYTES = 4096
_BACKLOG = 16
_ANSWER_S = 5.0


class ScaleServer:
    """The supervisor's end: a thread that passes on what it is told."""

    def __init__(self, path: Path, on_scale: Callable[[str, int], None]) -> None:
        """Args: `on_scale` is called on the thread, with the pool and its number of workers."""
        self._on_scale = on_scale
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen(_BACKLOG)
        threading.Thread(target=self._serve, name="scale", daemon=True).start()

    def close(self) -> None:
        # `close` alone does not wake a thread that waits in `accept`.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            # A router that dies in the middle of a word is nothing to us.
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_ANSWER_S)
                with connection.makefile("rb") as lines:
                    told = _parse(lines.readline(_LINE_BYTES))
                if told is not None:
                    self._on_scale(*told)
                    connection.sendall(b'{"ok": true}\n')


def _parse(line: bytes) -> tuple[str, int] | None:
    """Pool and number; None for anything else."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match told:
        case {"pool": str(pool), "replicas": int(replicas)} if replicas >= 0:
            return pool, replicas
        case _:
            return None


class SocketProvider:
    """The router's end; see `kvrelay_router.scaling.loop.Provider`."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def scale(self, pool: str, replicas: int) -> None:
        """Returns when the supervisor has heard it.

        Raises:
            OSError: it is not there.
            TimeoutError: it does not answer.
        """
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(self._path)
            try:
                writer.write(json.dumps({"pool": pool, "replicas": replicas}).encode() + b"\n")
                if not await reader.readline():
                    raise ConnectionError(f"{self._path} closed without an answer")
            finally:
                writer.close()
