"""`kvrelay bench gpu`."""

from pathlib import Path
from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, boolean, choice, device, number

SECTIONS = ("attention", "ops", "model", "peers")


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.gpu.run import run_gpu

    return run_gpu(values)


COMMAND = Command(
    "gpu",
    "Kernels and engine on one NVIDIA GPU, beside its measured bandwidth and matrix rate.",
    (
        Flag("--device", "cuda, cuda:N or auto", device, "auto", "what", "DEVICE"),
        Flag("--only", f"one part: {', '.join(SECTIONS)}", choice("all", *SECTIONS), "all",
             "what", "PART"),
        Flag("--smoke", "every path once at tiny shapes, on the CPU if that is the device; its "
             "times mean nothing", boolean, False, "what", switch=True),
        Flag("--budget", "start no further measurement after this time", number(1, 3600), 240.0,
             "how", "SECONDS"),
        Flag("--out", "the JSON file; a name below docs/results is chosen without it",
             lambda value: Path(value).expanduser(), None, "how", "FILE"),
    ),
    _run,
    epilog="Times are medians; inputs rotate through more memory than the second-level cache has, "
    "outputs\nare poisoned before and compared with a float64 reference after.",
)  # fmt: skip
