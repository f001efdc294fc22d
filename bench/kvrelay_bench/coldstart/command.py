"""`kvrelay bench coldstart`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, integer
from kvrelay_bench.compare.command import OUT


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.coldstart.run import run_coldstart

    return run_coldstart(values)


def parse_models(value: str) -> tuple[str, ...]:
    """Names of models, comma-separated."""
    models = tuple(name.strip() for name in value.split(",") if name.strip())
    if not models:
        raise ValueError("must name a model: demo, tiny, 135m, 0.5b")
    return models


COMMAND = Command(
    "coldstart",
    "A request to pools at zero or asleep: until somebody is called, until the first token.",
    (
        Flag("--models", "demo, and random-weight sizes: tiny, 135m, 0.5b", parse_models,
             ("demo", "0.5b"), "what", "LIST"),
        Flag("--rounds", "starts of each kind, after one that is not counted", integer(1), 10,
             "how", "N"),
        OUT,
    ),
    _run,
)  # fmt: skip
