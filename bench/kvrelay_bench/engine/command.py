"""`kvrelay bench engine`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, choice, device, integer
from kvrelay_bench.compare.command import MODEL, OUT, THREADS


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.engine.run import run_engine

    return run_engine(values)


COMMAND = Command(
    "engine",
    "Offline throughput of this engine, beside what the machine can read and multiply.",
    (
        MODEL,
        Flag("--batch", "prompts in a call", integer(1), 8, "what", "N"),
        Flag("--input-len", "tokens of each prompt", integer(1), 32, "what", "TOKENS"),
        Flag("--output-len", "tokens of each answer", integer(1), 64, "what", "TOKENS"),
        Flag("--dtype", "auto, float32, bfloat16 or float16",
             choice("auto", "float32", "bfloat16", "float16"), "auto", "what", "DTYPE"),
        Flag("--quantization", "int8: 8-bit weights; or none", choice("none", "int8"), "none",
             "what", "NAME"),
        Flag("--device", "cpu, cuda, cuda:N or auto", device, "auto", "what", "DEVICE"),
        Flag("--rounds", "timed calls, after one that is not", integer(1), 5, "how", "N"),
        THREADS,
        OUT,
    ),
    _run,
)  # fmt: skip
