"""`kvrelay bench router`."""

from pathlib import Path
from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, choice, duration, integer, number, text


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.router.run import run

    return run(values)


COMMAND = Command(
    "router",
    "what the router adds to a request, and what a streamed token costs it (mock workers)",
    (
        Flag("--model", "folder or hub id whose tokenizer and template are used", text,
             default=None, metavar="MODEL"),
        Flag("--rate", "requests a second, Poisson arrivals", number(1, 100_000), default=500.0,
             metavar="N", group="latency"),
        Flag("--duration", "seconds of arrivals that count", duration(0.01), default=10.0,
             metavar="SECONDS", group="latency"),
        Flag("--tokens", "output tokens of each request", integer(1, 4096), default=8,
             metavar="N", group="latency"),
        Flag("--path", "disaggregated or local", choice("disaggregated", "local"),
             default="disaggregated", metavar="PATH", group="latency"),
        Flag("--streams", "streams at once", integer(1, 8192), default=256, metavar="N",
             group="streaming"),
        Flag("--stream-tokens", "output tokens of each stream", integer(2, 100_000), default=1000,
             metavar="N", group="streaming"),
        Flag("--step", "time between decode steps in the paced runs", duration(0.0005),
             default=0.02, metavar="SECONDS"),
        Flag("--only", "one part: latency, floor (the router's libraries alone), paced or saturated",
             choice("latency", "floor", "paced", "saturated"), default=None, metavar="PART"),
        Flag("--prompt-words", "words of each prompt", integer(1, 100_000), default=32,
             metavar="N"),
        Flag("--core", "the router's core; the others get everything else", integer(0, 4095),
             default=None, metavar="N"),
        Flag("--rounds", "how often each part runs", integer(1, 100), default=1, metavar="N"),
        Flag("--seed", "of arrivals and prompts", integer(0), default=1, metavar="N"),
        Flag("--out", "where to write the result as JSON", Path, default=None, metavar="FILE"),
    ),
    _run,
)  # fmt: skip
