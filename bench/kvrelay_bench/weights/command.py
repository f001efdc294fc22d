"""`kvrelay bench weights`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, integer, size, text

_MIB = 1024 * 1024
_FLAGS = (
    Flag("--size", "of the random checkpoint", size(_MIB), 512 * _MIB, "what", "SIZE"),
    Flag("--streams", "requests at once, of both clients", integer(1, 256), 16, "how", "N"),
    Flag("--part", "the largest request, of both clients", size(64 * 1024), 8 * _MIB, "how", "SIZE"),
    Flag("--rounds", "of every client, interleaved, after one that is not counted", integer(1), 5,
         "how", "N"),
    Flag("--out", "where the JSON goes", text, None, "result", "FILE"),
)  # fmt: skip


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.weights.run import run_weights

    return run_weights(values)


COMMAND = Command(
    "weights",
    "Weights from a local S3 server: our loader as a share of a plain ranged-GET client.",
    _FLAGS,
    _run,
    epilog="Two servers, each a process of its own: moto's, and a bare one that sends files with\n"
    "sendfile(2). Exit code 1 where the loader without checksums is below 80 %; what\n"
    "sha256 costs depends on the CPU and shows in its own row. A third way takes the same bytes\n"
    "from a peer process over UCX; it is compared, not judged.",
)
