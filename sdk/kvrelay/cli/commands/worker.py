"""`kvrelay prefill` and `kvrelay decode`: the same flags, another role."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.commands.shared import WORKER_FLAGS

_EXIT = "Ctrl-C drains, twice stops at once. Exit codes: those of kvrelay up, and 10\nrefused by the router."


def _run_prefill(values: SimpleNamespace) -> int:
    from kvrelay.cli.processes import run_worker

    return run_worker("prefill", values)


def _run_decode(values: SimpleNamespace) -> int:
    from kvrelay.cli.processes import run_worker

    return run_worker("decode", values)


PREFILL = Command(
    "prefill",
    "Read prompts and push their KV blocks to decode workers.",
    WORKER_FLAGS,
    _run_prefill,
    epilog=_EXIT,
)
DECODE = Command(
    "decode",
    "Receive KV blocks and write answers; prefills locally when told to.",
    WORKER_FLAGS,
    _run_decode,
    epilog=_EXIT,
)
