"""`kvrelay bench transfer`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, boolean, integer, size, text
from kvrelay_bench.plot import plot_file

_KIB, _MIB = 1024, 1024 * 1024
SIZES = tuple(64 * _KIB * 4**power for power in range(6))
"""64 KiB to 64 MiB."""

_FLAGS = (
    Flag("--size", "payload of a message; repeatable", size(16 * _KIB), SIZES, "transfer", "SIZE",
         repeated=True),
    Flag("--prompt-tokens", "tokens of a prompt whose KV is handed over whole; repeatable", integer(1),
         (1024, 4096), "transfer", "TOKENS", repeated=True),
    Flag("--rounds", "of everything, interleaved", integer(1), 5, "transfer", "N"),
    Flag("--transport", "URI of our transport, such as ucx://?tls=tcp", text, "ucx://", "transfer",
         "URI"),
    Flag("--staging", "payload of one staging buffer of the hand-over", size(64 * _KIB), 4 * _MIB,
         "transfer", "SIZE"),
    Flag("--staging-buffers", "staging buffers of each process", integer(2), 32, "transfer", "N"),
    Flag("--skip-perftest", "leave out ucx_perftest", boolean, False, "transfer", switch=True),
    Flag("--model", "also in a whole stack with this model: folder, hub id, or a random-weight size "
         "(tiny, 135m, 0.5b)", text, None, "transfer", "MODEL"),
    Flag("--out", "where the JSON goes", text, None, "result", "FILE"),
    Flag("--plot", "draw rates over message sizes (.png, .svg, .pdf)", plot_file, None, "result",
         "FILE"),
)  # fmt: skip


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.transfer.run import run_transfer

    return run_transfer(values)


COMMAND = Command(
    "transfer",
    "KV between two processes, stage by stage, beside plain UCX and memcpy.",
    _FLAGS,
    _run,
    epilog="About two minutes on two cores; with --model 0.5b, some three more. Ctrl-C keeps the rounds that have ended.",
)
