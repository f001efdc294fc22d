"""`kvrelay bench compile-gate`."""

from pathlib import Path
from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, text


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.compile_gate.run import run_compile_gate

    return run_compile_gate(values)


COMMAND = Command(
    "compile-gate",
    "Triton kernels compiled for A100, H100 and B200 without a GPU: registers, spills, instructions.",
    (
        Flag("--only", "kernels whose name contains this", text, None, "what", "TEXT"),
        Flag("--out", "the JSON file; a name below the cache is chosen without it",
             lambda value: Path(value).expanduser(), None, "how", "FILE"),
    ),
    _run,
    epilog="Fails with code 1 when a kernel spills, lacks an instruction or fits too few programs on "
    "a\nmultiprocessor. Beside it: the least time of each kernel's work on an H100 and an H200.",
)  # fmt: skip
