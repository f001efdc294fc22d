"""The supervisor's side of the fork server: start it, ask it for children, own what it returns."""

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import IO

from kvrelay_infra.launcher import launched

_PR_SET_CHILD_SUBREAPER = 36
_REPLY_S = 10.0


class _Adoption:
    """Whether orphans below this process become its children: while any fork server of it is open."""

    def __init__(self) -> None:
        self._open = 0
        self._lock = threading.Lock()

    def change(self, step: int) -> None:
        with self._lock:
            self._open += step
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(self._open > 0))


_adoption = _Adoption()


class ForkState(Enum):
    """What the fork server can do now."""

    LOADING = auto()
    USABLE = auto()
    GONE = auto()


class ForkedProcess:
    """A child that the fork server made and this process adopted; the part of Popen that is needed."""

    def __init__(self, pid: int, stdout: IO[bytes]) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None

    def wait(self) -> int:
        """Reap it; its exit status, or minus the signal's number."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


class ForkServer:
    """Owns the fork server's process. Children outlive it; they die with this process.

    Args:
        preload: `module:function` to call before the first fork.
        environment: added to our own while it preloads.
        on_ready: called once, from another thread: whether it can fork.
    """

    def __init__(
        self,
        preload: str,
        environment: Mapping[str, str],
        *,
        on_ready: Callable[[bool], None],
    ) -> None:
        _adoption.change(+1)
        self.state = ForkState.LOADING
        self._on_ready = on_ready
        self._lock = threading.Lock()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        module = [sys.executable, "-m", "kvrelay_infra.fork_server"]
        with theirs:
            self._process = subprocess.Popen(
                launched([*module, str(theirs.fileno()), str(os.getpid()), preload]),
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        threading.Thread(target=self._await_ready, name="fork-server", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def spawn(self, command: Sequence[str], environment: Mapping[str, str]) -> ForkedProcess:
        """Fork a child that runs `[python, "-m", module, ...]` with exactly this environment.

        Raises:
            OSError: the fork server is gone; the command has to be started in the ordinary way.
        """
        reading, writing = os.pipe()
        request = {"arguments": list(command[1:]), "environment": dict(environment)}
        try:
            with self._lock:
                socket.send_fds(self._channel, [json.dumps(request).encode()], [writing])
                reply = self._channel.recv(1024)
            if not reply:
                raise ConnectionResetError("the fork server is gone")
        except OSError:
            self.state = ForkState.GONE
            os.close(reading)
            raise
        finally:
            os.close(writing)
        return ForkedProcess(json.loads(reply)["pid"], os.fdopen(reading, "rb"))

    def close(self) -> None:
        """End it, once; what it forked lives on."""
        self.state = ForkState.GONE
        _adoption.change(-1)
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def _await_ready(self) -> None:
        ready = b""
        with contextlib.suppress(OSError):  # closed meanwhile
            ready = self._channel.recv(1024)
            self._channel.settimeout(_REPLY_S)
        self.state = ForkState.USABLE if ready else ForkState.GONE
        self._on_ready(bool(ready))
