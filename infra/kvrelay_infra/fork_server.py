"""A process that has imported what workers need, and becomes one by forking.

```
supervisor ──{argv, env} + output fd──► fork server ──fork──► intermediate ──fork──► worker
     ▲  ◄───────────────────{pid}──────────┘                     exits at once         │
     └───────────────── adopts it: the supervisor is a subreaper ◄─────────────────────┘
```

Importing torch and UCX takes seconds, forking milliseconds, and forked workers share the imported
pages. The supervisor becomes the parent of every worker: it reaps it, and the kernel's parent-death
signal ties the two. What is preloaded must start no thread and open no device.

Run by the supervisor only: `python -m kvrelay_infra.fork_server CHANNEL_FD SUPERVISOR_PID MODULE:FUNCTION`.
"""

import gc
import importlib
import json
import os
import runpy
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

import setproctitle

from kvrelay_infra.launcher import die_with

MAX_REQUEST_BYTES = 4 * 1024 * 1024
_ADOPTION_S = 5.0


@dataclass(frozen=True, slots=True)
class _Child:
    """What the forked process is to become."""

    arguments: list[str]
    """After the interpreter: `-m`, a module, and its arguments."""
    environment: dict[str, str]
    output: int


def main(arguments: list[str]) -> None:
    """Preload, then fork one child per request until the supervisor closes the channel."""
    channel = socket.socket(fileno=int(arguments[0]))
    supervisor = int(arguments[1])
    inherited = frozenset(os.environ)
    _call(arguments[2])
    # Libraries leave settings for themselves in the environment as they load.
    left_behind = {k: v for k, v in os.environ.items() if k not in inherited}
    setproctitle.setproctitle("kvrelay fork-server")
    gc.collect()
    gc.freeze()  # the collector shall not write to pages that are shared
    channel.send(json.dumps({"ready": os.getpid()}).encode())
    while True:
        child = _next(channel)
        if child is None:
            return
        if _fork(channel):
            break
        os.close(child.output)
    channel.close()
    _become(child, supervisor, left_behind)


def _call(target: str) -> None:
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)()


def _next(channel: socket.socket) -> _Child | None:
    message, descriptors, _, _ = socket.recv_fds(channel, MAX_REQUEST_BYTES, 1)
    if not message:
        return None
    request: dict[str, Any] = json.loads(message)
    return _Child(request["arguments"], request["environment"], descriptors[0])


def _fork(channel: socket.socket) -> bool:
    """Fork twice, so that the supervisor adopts the child. True in the child."""
    reading, writing = os.pipe()
    intermediate = os.fork()
    if intermediate == 0:
        child = os.fork()
        if child:
            os.write(writing, child.to_bytes(8, "little"))
            os._exit(0)
        os.close(reading)
        os.close(writing)
        return True
    os.close(writing)
    pid = int.from_bytes(os.read(reading, 8), "little")
    os.close(reading)
    # Only now the child has the supervisor as its parent.
    os.waitpid(intermediate, 0)
    channel.send(json.dumps({"pid": pid}).encode())
    return False


def _become(child: _Child, supervisor: int, left_behind: dict[str, str]) -> None:
    # A session of its own: Ctrl-C in the terminal reaches only the supervisor.
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(child.output, descriptor)
    os.close(child.output)
    deadline = time.monotonic() + _ADOPTION_S
    while os.getppid() != supervisor:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.0005)
    die_with(supervisor)
    os.environ.clear()
    os.environ.update(left_behind | child.environment)
    setproctitle.setproctitle(" ".join(["kvrelay", *child.arguments[2:]]))
    sys.argv[1:] = child.arguments[2:]
    runpy.run_module(child.arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
