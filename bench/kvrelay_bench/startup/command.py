"""`kvrelay bench startup`."""

from pathlib import Path
from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, boolean, integer
from kvrelay_bench.compare.command import MODEL, OUT, PEERS_DIR, THREADS
from kvrelay_bench.compare.engines import parse_peers


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.report import cache_dir
    from kvrelay_bench.startup.run import run_startup

    values.peers_dir = Path(values.peers_dir or cache_dir() / "peers").expanduser().absolute()
    return run_startup(values)


COMMAND = Command(
    "startup",
    "Process start to first token, phase by phase, weights in the page cache.",
    (
        MODEL,
        Flag("--int8", "8-bit weights too", boolean, False, "what", switch=True),
        Flag("--peers", "other engines as well, as in bench compare", parse_peers, (), "peers",
             "LIST"),
        PEERS_DIR,
        Flag("--rounds", "fresh processes of each engine, after one that is not counted",
             integer(1), 5, "how", "N"),
        THREADS,
        OUT,
    ),
    _run,
)  # fmt: skip
