"""`kvrelay simulate`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, boolean, duration, integer, text


def _settings(value: str) -> tuple[str, tuple[str, ...]]:
    """A dotted key and the values to try."""
    key, equals, values = value.partition("=")
    if not (key and equals and all(values.split(","))):
        raise ValueError("must be KEY=VALUE or KEY=VALUE,VALUE such as targets.utilisation=0.8,0.9")
    return key, tuple(values.split(","))


_FLAGS = (
    Flag("--trace", "Mooncake JSON lines, Azure CSV, or a synthetic load: lone, square, step, diurnal "
         "or swap", text, None, "load", "FILE|NAME", required=True),
    Flag("--fleet", "YAML: rates, starts, bounds and limits; or the name of one that comes with it: "
         "h100-8b, h100-8b-sleep, h100-8b-one-pool, h100-8b-one-pool-sleep", text, "h100-8b", "fleet", "FILE|NAME"),
    Flag("--set", "a key of the fleet file and its value; with several, all combinations are run, with "
         "the oracle and no other policy", _settings, None, "fleet", "KEY=VALUE[,VALUE]", repeated=True),
    Flag("--copies", "every request so many times, within a minute", integer(1, 100000), 1, "load",
         "N"),
    Flag("--skip", "begin after so many requests", integer(0), 0, "load", "N"),
    Flag("--limit", "only the first requests", integer(1), None, "load", "N"),
    Flag("--warmup", "served but not counted: a trace is cut out of a running service", duration(), 0.0,
         "load", "TIME"),
    Flag("--seed", "of synthetic loads, and of placement in large fleets", integer(0), 0, "load",
         "N"),
    Flag("--brief", "our policy and the oracle, no other", boolean, False, "result", switch=True),
    Flag("--out", "where the JSON goes", text, None, "result", "FILE"),
    Flag("--plot", "draw demand, replicas and cost (.png, .svg, .pdf)", text, None, "result",
         "FILE"),
)  # fmt: skip


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.plot import plot_file
    from kvrelay_bench.simulate.run import run_simulate
    from kvrelay_protocol.errors import UsageError

    if values.plot is not None:
        try:
            values.plot = plot_file(values.plot)
        except ValueError as error:
            raise UsageError(f"--plot {values.plot} {error}") from None
    return run_simulate(values)


SIMULATE = Command(
    "simulate",
    "A fleet on a virtual clock: what the scaler would have done, and what it would have cost.",
    _FLAGS,
    _run,
    epilog="The policy and the placement are those of the router. Beside them: a clairvoyant oracle,\n"
    "always on, an HPA on the queue, and a fixed keep-alive.\n"
    "Exit codes: 0 when every request was answered, else 1.",
)
