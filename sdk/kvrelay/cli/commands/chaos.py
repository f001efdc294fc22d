"""`kvrelay chaos`."""

from dataclasses import replace
from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.commands.shared import ENGINE, MODEL, TRANSFER, MiB
from kvrelay.cli.flags import Flag, boolean, choice, duration, existing_file, integer, text

_SCENARIOS = ("load", "transfers")

_FAULTS = (
    Flag("--scenario", "load: a whole stack, broken while it answers; transfers: single ones, without it",
         choice(*_SCENARIOS), "load", "faults", "|".join(_SCENARIOS)),
    Flag("--faults", "how many", integer(1), 1000, "faults", "N"),
    Flag("--seed", "of the plan, the questions and the clients", integer(0), 0, "faults", "S"),
    Flag("--duration", "spread the faults over this time; 0: as close as the stack can take them",
         duration(), 0.0, "faults", "TIME"),
    Flag("--plan", "carry out this plan, and not one of the seed", existing_file, None, "faults",
         "FILE"),
    Flag("--save-plan", "write the plan there before it is carried out", text, None, "faults",
         "FILE"),
    Flag("--print-plan", "print the plan and do nothing", boolean, False, "faults", switch=True),
    Flag("--out", "where the JSON goes", text, None, "result", "FILE"),
)  # fmt: skip

_STACK = (
    Flag("--prefill", "prefill workers", integer(1, 16), 2, "stack", "N"),
    Flag("--decode", "decode workers", integer(1, 16), 2, "stack", "N"),
    Flag("--routers", "routers, all joined by every worker", integer(1, 4), 1, "stack", "N"),
    Flag("--lease", "a KV lease ends after this", duration(0.1), 1.0, "stack", "SECONDS"),
    Flag("--heartbeat", "pause between load reports", duration(0.01), 0.25, "stack", "SECONDS"),
    Flag("--drain-grace", "how long a worker may drain", duration(), 5.0, "stack", "SECONDS"),
)  # fmt: skip

_LOAD = (
    Flag("--users", "clients that ask, one request each at a time", integer(1, 1024), 12, "load",
         "N"),
    Flag("--questions", "different requests among them", integer(1, 10000), 48, "load", "N"),
    Flag("--deadline", "of every request; one that is silent past it counts as hung",
         duration(1.0), 20.0, "load", "SECONDS"),
)  # fmt: skip


_TRANSFERS = (
    Flag("--kills", "transfers of which one side is killed; 0: none", integer(0), 500,
         "scenario transfers", "N"),
    Flag("--flips", "transfers with a flipped bit; 0: none", integer(0), 10000,
         "scenario transfers", "N"),
    Flag("--answers", "answers over transfers with a flipped bit; 0: none", integer(0), 500,
         "scenario transfers", "N"),
)  # fmt: skip


_ENGINE = tuple(
    replace(flag, default=24 * MiB) if flag.name == "--kv-memory" else flag for flag in ENGINE
)
"""A pool that the load fills: blocks are evicted and sequences preempted all the time."""


def _run(values: SimpleNamespace) -> int:
    if values.scenario == "transfers":
        from kvrelay_chaos.transfers.command import run_transfers

        return run_transfers(values)
    from kvrelay_chaos.run import run_chaos

    return run_chaos(values)


CHAOS = Command(
    "chaos",
    "Break a stack of its own under load, and prove that nothing came of it.",
    (*_FAULTS, *_TRANSFERS, *_LOAD, *_STACK, *MODEL, *_ENGINE, *TRANSFER),
    _run,
    epilog="Every answer is compared with that of the stack before the first fault. The same seed\n"
    "gives the same plan; how it falls in with the requests differs from run to run.\n"
    "Exit codes: 0 when nothing was wrong, hung or leaked and every fault fired, else 1.",
)
