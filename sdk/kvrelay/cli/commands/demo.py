"""`kvrelay demo`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.commands.shared import ENGINE, MODEL, POOLS, TIMES
from kvrelay.cli.flags import Flag, boolean, integer, text

DEMO_FLAGS = (
    *MODEL,
    Flag("--prompt", "what to ask", text, "What does os.path.join do?", "demo", "TEXT"),
    Flag("--max-tokens", "longest answer", integer(1), 128, "demo", "N"),
    Flag("--verbose", "show what the processes print", boolean, False, "demo", switch=True),
    *POOLS,
    *ENGINE,
    *TIMES,
)


def _run(values: SimpleNamespace) -> int:
    from kvrelay.cli.demo import run_demo

    return run_demo(values)


DEMO = Command(
    "demo",
    "Start router and workers on free ports, ask a question, show what happened.",
    DEMO_FLAGS,
    _run,
)
