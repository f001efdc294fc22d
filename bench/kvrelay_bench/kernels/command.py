"""`kvrelay bench kernels`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, boolean, choice, integer
from kvrelay_bench.compare.command import OUT, THREADS

OPS = ("attention", "linear", "elementwise")


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.kernels.run import run_kernels

    return run_kernels(values)


COMMAND = Command(
    "kernels",
    "The CPU kernels one by one, beside what the machine reads and multiplies, and torch.",
    (
        Flag("--only", f"one part: {', '.join(OPS)}", choice("all", *OPS), "all", "what", "PART"),
        Flag("--smoke", "every path once at tiny shapes; its times mean nothing", boolean, False,
             "what", switch=True),
        Flag("--rounds", "timings of each, of which the shortest counts", integer(1), 7, "how",
             "N"),
        THREADS,
        OUT,
    ),
    _run,
    epilog="Shapes of the 0.5b benchmark model in blocks of 16 tokens; about two minutes on two cores.\n"
    "Weights and KV rotate through more memory than the last-level cache holds, as the layers\n"
    "of a model do; activations stay in the caches. Ours are called as the engine calls them, from a\n"
    "recording, and torch's from Python.",
)  # fmt: skip
