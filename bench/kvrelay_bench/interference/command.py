"""`kvrelay bench interference`."""

from dataclasses import replace
from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, duration, integer, text
from kvrelay_bench.plot import plot_file
from kvrelay_bench.serve.stack import MODEL_FLAG, STACK_FLAGS

_EXPERIMENT = (
    Flag("--streams", "answers that run the whole time", integer(1), 8, "experiment", "N"),
    Flag("--stream-input", "length of their prompts", integer(1), 64, "experiment", "TOKENS"),
    Flag("--long-input", "length of the prompts that arrive", integer(1), 2048, "experiment",
         "TOKENS"),
    Flag("--long-output", "length of their answers", integer(1), 8, "experiment", "TOKENS"),
    Flag("--arrivals", "long prompts of a round", integer(1), 3, "experiment", "N"),
    Flag("--every", "pause between them", duration(0.01), 10.0, "experiment", "SECONDS"),
    Flag("--quiet", "the streams alone, before", duration(0.1), 5.0, "experiment", "SECONDS"),
    Flag("--rounds", "of every contender, interleaved", integer(1), 3, "experiment", "N"),
    Flag("--cores", "threads of each contender, all workers together; 0: this machine's",
         integer(0), 0, "experiment", "N"),
    Flag("--chunk", "prompt tokens in one step; repeatable, an aggregated contender each, the first "
         "also for the prefill worker", integer(1), (512, 128), "experiment", "TOKENS",
         repeated=True),
    Flag("--seed", "of the prompts", integer(0), 0, "experiment", "N"),
    Flag("--timeout", "longest wait for an answer", duration(1), 300.0, "experiment", "SECONDS"),
    Flag("--out", "where the JSON goes", text, None, "result", "FILE"),
    Flag("--plot", "draw ITL over time (.png, .svg, .pdf)", plot_file, None, "result", "FILE"),
)  # fmt: skip

_STACK = tuple(
    replace(flag, default=1024**3) if flag.name == "--kv-memory" else flag
    for flag in STACK_FLAGS
    if flag.name not in {"--threads", "--max-batch-tokens"}
)


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.interference.run import run_interference

    return run_interference(values)


COMMAND = Command(
    "interference",
    "Running streams while long prompts arrive: two pools against one worker, equal threads.",
    (*_EXPERIMENT, replace(MODEL_FLAG, default="0.5b"), *_STACK),
    _run,
    epilog="All contenders have the same threads in all. Ctrl-C keeps the rounds that have ended.",
)
