"""A process that has imported what a party needs and becomes one by forking: 25 ms, not 2 s, a victim.

It starts no thread and no UCX, so that a forked child starts its own. Run by `Nursery` only:
`python -m kvrelay_chaos.transfers.nursery FD`.
"""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from types import TracebackType
from typing import Any, Self

from kvrelay_chaos.transfers.side import Shape
from kvrelay_protocol.errors import EngineFailed


@dataclass(frozen=True, slots=True)
class Birth:
    """What a child is to be; see `party.run_party`."""

    shape: Shape
    uri: str
    seed: int


@dataclass(frozen=True, slots=True)
class Child:
    """A running party. Its pipe ends when it does; closing the pipe ends it."""

    pid: int
    pipe: Connection

    def hear(self, *kinds: type[Any], timeout_s: float = 60.0) -> Any:
        """The next report, which must be of one of these kinds.

        Raises:
            EOFError: the process has ended.
            EngineFailed: it says nothing, or something else.
        """
        if not self.pipe.poll(timeout_s):
            raise EngineFailed(f"process {self.pid} said nothing for {timeout_s:g} s")
        heard = self.pipe.recv()
        if not isinstance(heard, kinds):
            raise EngineFailed(f"process {self.pid} said {heard}, which was not its turn")
        return heard


class Nursery:
    """Owns the process that forks. Children end with their pipes, so with this process too."""

    def __init__(self) -> None:
        self._channel, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "kvrelay_chaos.transfers.nursery"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
            )

    def bear(self, birth: Birth) -> Child:
        """Fork a party; its transport is not started yet.

        Raises:
            EOFError: the process that forks has ended.
        """
        ours, theirs = Pipe()
        with theirs:
            self._channel.send(birth)
            send_handle(self._channel, theirs.fileno(), self._process.pid)
            return Child(self._channel.recv(), ours)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()
        self._process.wait()


def main(descriptor: int) -> None:
    """Import, then fork one child per request until the channel ends."""
    import torch

    from kvrelay_chaos.transfers.party import run_party
    from kvrelay_transfer.ucx_worker import load_ucx

    load_ucx()
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for children: the kernel reaps
    channel: Connection = Connection(descriptor)
    while True:
        try:
            birth: Birth = channel.recv()
            end = recv_handle(channel)
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            break
        os.close(end)
        channel.send(pid)
    channel.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    run_party(Connection(end), birth.shape, birth.uri, birth.seed)


if __name__ == "__main__":
    main(int(sys.argv[1]))
