"""Becomes another command that can't outlive its parent: `launcher.py PARENT_PID COMMAND [ARG ...]`.

Run by path with `python -I -S`, so it costs milliseconds and imports nothing of ours. The kernel's
parent-death signal survives the exec; SIGKILL, because a worker that lost its supervisor may hang.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def launched(command: list[str]) -> list[str]:
    """The command line that runs `command` as a child which can't outlive this process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends; exit if that has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the signal was armed.
    if os.getppid() != parent:
        sys.exit(1)


def main(arguments: list[str]) -> None:
    """Tie this process to its parent, then replace it."""
    parent, command = int(arguments[0]), arguments[1:]
    die_with(parent)
    os.execvp(command[0], command)  # noqa: S606  # an argument list, no shell


if __name__ == "__main__":
    main(sys.argv[1:])
