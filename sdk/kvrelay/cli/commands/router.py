"""`kvrelay router`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.commands.shared import ROUTER_FLAGS


def _run(values: SimpleNamespace) -> int:
    from kvrelay.cli.processes import run_router

    return run_router(values)


ROUTER = Command(
    "router",
    "Serve HTTP and place requests on the workers that join.",
    ROUTER_FLAGS,
    _run,
)
