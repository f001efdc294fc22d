"""A worker that can be made to fail: `python -m kvrelay_chaos.worker NAME SOCKET DISK COMMAND ...`.

COMMAND and what follows it are those of `kvrelay`, and so is everything else but what `install` replaces:
the UCX transport by one that follows orders, and the constructors in the workers' `main` modules by ones
that let the agent see what they make. DISK is `free` or `full`.
"""

import sys
from collections.abc import Sequence

from kvrelay_chaos.agent import Agent, Clock
from kvrelay_chaos.full_disk import fill_disk


def install(name: str, socket: str) -> None:
    """Put agent, transport and clock into this process, before the worker in it starts."""
    import kvrelay_decode.main
    import kvrelay_prefill.main
    from kvrelay_transfer.transport import register_transport

    clock = Clock()
    clock.install()
    agent = Agent(name, socket, clock)
    register_transport("ucx", "kvrelay_chaos.kv_plane", "FaultyUcxTransport")
    for module, role in ((kvrelay_decode.main, "Decode"), (kvrelay_prefill.main, "Prefill")):
        for wrap, wrapped in (
            (agent.watch_kit, "make_kit"),
            (agent.watch_host, "WorkerHost"),
            (agent.watch_worker, f"{role}Worker"),
            (agent.watch_scheduler, f"{role}Scheduler"),
        ):
            setattr(module, wrapped, wrap(getattr(module, wrapped)))


def main(arguments: Sequence[str]) -> int:
    """Become the worker; returns its exit code."""
    name, socket, disk, *command = arguments
    if disk == "full":
        print(f"the disk of {name} is full: {fill_disk()}", flush=True)
    from kvrelay.cli.main import main as kvrelay

    install(name, socket)
    return kvrelay(command)


if __name__ == "__main__":
    # Under this name the module is not the one that others import.
    from kvrelay_chaos.worker import main as imported_main

    sys.exit(imported_main(sys.argv[1:]))
