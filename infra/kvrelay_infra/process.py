"""One child process: started so that it dies with us, its output relayed line by line."""

import contextlib
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from kvrelay_infra.forking import ForkedProcess, ForkServer
from kvrelay_infra.launcher import launched

_TAIL_LINES = 40


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run and under which name. Secrets go into `environment`: arguments show up in `ps`."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to our own environment."""
    preloaded: bool = False
    """Its command is `[python, "-m", module, ...]` and needs what the fork server has imported."""


class ChildProcess:
    """Owns one operating-system process, its process group and the two threads that watch it.

    Start it from a thread that lives at least as long as the child: the kernel ties the child to
    that thread, not to the process.
    """

    def __init__(
        self,
        spec: ChildSpec,
        *,
        on_line: Callable[[str, str], None],
        on_exit: Callable[[str, int], None],
        fork_server: ForkServer | None = None,
    ) -> None:
        self.spec = spec
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._on_line = on_line
        self._on_exit = on_exit
        self._segments: list[Path] = []
        # Held while signalling and while reaping: a reaped pid may belong to someone else.
        self._reaping = threading.Lock()
        self._process = _start(spec, fork_server if spec.preloaded else None)
        self._reader = threading.Thread(target=self._read, name=f"{spec.name}-output", daemon=True)
        self._waiter = threading.Thread(target=self._wait, name=f"{spec.name}-wait", daemon=True)
        self._reader.start()
        self._waiter.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status, or minus the signal's number; None while it runs."""
        return self._process.returncode

    def tail(self, lines: int) -> list[str]:
        """The last lines of its output."""
        return list(self._tail)[-lines:]

    def terminate(self) -> None:
        with self._reaping:
            if self._process.returncode is None:
                os.kill(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the process and everything it started."""
        with self._reaping:
            if self._process.returncode is None:
                self._segments = _mapped_segments(self._process.pid)
                self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _reap_group(self) -> None:
        # A forked child's own children become ours when it dies (forking.py).
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-self._process.pid, os.WNOHANG)[0]:
                pass

    def _read(self) -> None:
        stdout = cast("IO[bytes]", self._process.stdout)
        for raw in stdout:
            # Progress bars rewrite their line; its last state is the one worth a line here.
            line = raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
            self._tail.append(line)
            self._on_line(self.spec.name, line)
        stdout.close()

    def _wait(self) -> None:
        # Look without reaping, so that helpers it left behind can still be addressed by its group.
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        with self._reaping:
            self._kill_group()
            status = self._process.wait()
        self._reap_group()
        # What it could not remove itself any more.
        for segment in self._segments:
            segment.unlink(missing_ok=True)
        self._reader.join(timeout=2.0)
        self._on_exit(self.spec.name, status)


def _start(
    spec: ChildSpec, fork_server: ForkServer | None
) -> "subprocess.Popen[bytes] | ForkedProcess":
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **spec.environment}
    if fork_server is not None:
        # Without the fork server it starts all the same, only later.
        with contextlib.suppress(OSError):
            return fork_server.spawn(spec.command, environment)
    return subprocess.Popen(
        launched(list(spec.command)),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A session of its own: Ctrl-C in the terminal reaches only the supervisor.
        start_new_session=True,
    )


def _mapped_segments(pid: int) -> list[Path]:
    """Shared-memory files a process has mapped that still have a name and belong to us."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return []
    names = {line.partition("/dev/shm/")[2] for line in lines if "/dev/shm/" in line}  # noqa: S108
    found = [Path("/dev/shm") / name for name in names if not name.endswith(" (deleted)")]  # noqa: S108
    return [path for path in found if path.exists() and path.stat().st_uid == os.getuid()]
