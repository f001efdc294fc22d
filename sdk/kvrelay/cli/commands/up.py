"""`kvrelay up`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.commands.shared import STACK_FLAGS


def _run(values: SimpleNamespace) -> int:
    from kvrelay.cli.stack import run_up

    return run_up(values)


UP = Command(
    "up",
    "Serve a model: a router, prefill and decode workers, restarted when they die.",
    STACK_FLAGS,
    _run,
    epilog="Ctrl-C drains, twice stops at once. Exit codes: 2 flags, 3 no model,\n"
    "4 unsupported model, 5 port in use, 6 memory, 7 device, 8 a worker did not\n"
    "start, 9 transport, 130 stopped at once.",
)
