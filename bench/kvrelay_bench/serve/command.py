"""`kvrelay bench serve`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import (
    Flag,
    api_key,
    base_url,
    duration,
    existing_file,
    integer,
    number,
    text,
)
from kvrelay_bench.plot import plot_file
from kvrelay_bench.serve.metrics import parse_objectives
from kvrelay_bench.serve.stack import MODEL_FLAG, POOL_FLAGS, STACK_FLAGS
from kvrelay_bench.serve.workload import Lengths, parse_lengths

_SERVER = (
    Flag("--base-url", "measure this server; none: start a stack", base_url, None, "server", "URL"),
    Flag("--api-key", "what that server wants", api_key, "", "server", "KEY", secret=True),
    Flag("--vocab-size", "draw its prompts from token ids below this", integer(16), 1000, "server",
         "N"),
)  # fmt: skip

_LOAD = (
    Flag("--rate", "open loop: Poisson arrivals a second; repeatable, a run each",
         number(1e-3, 1e5), (), "load", "R", repeated=True),
    Flag("--concurrency", "closed loop: this many users; repeatable, a run each",
         integer(1, 65536), (), "load", "N", repeated=True),
    Flag("--trace", "lengths, and without the two above arrivals too: Azure CSV or Mooncake JSONL",
         existing_file, None, "trace", "FILE"),
    Flag("--speed-up", "divide the trace's pauses by this", number(1e-3, 1e6), 1.0, "trace", "X"),
    Flag("--divide-lengths", "divide the trace's lengths by this", number(1.0, 1e6), 1.0, "trace",
         "X"),
    Flag("--limit", "take this many requests of the trace", integer(1), 100, "trace", "N"),
    Flag("--max-input-len", "cut prompts to this", integer(1), None, "trace", "TOKENS"),
    Flag("--max-output-len", "cut answers to this", integer(1), None, "trace", "TOKENS"),
    Flag("--requests", "requests of a run without a trace", integer(1), 64, "load", "N"),
    Flag("--input-len", "prompt length, or a range A-B", parse_lengths, Lengths(128, 128), "load",
         "TOKENS"),
    Flag("--output-len", "answer length, or a range A-B", parse_lengths, Lengths(64, 64), "load",
         "TOKENS"),
    Flag("--seed", "of arrivals, lengths and prompts", integer(0), 0, "load", "N"),
    Flag("--warmup", "requests sent before, and not counted", integer(0), 4, "load", "N"),
    Flag("--timeout", "a request that takes longer counts as aborted", duration(0.1), 600.0, "load",
         "SECONDS"),
)  # fmt: skip

_RESULT = (
    Flag("--slo", "objectives for goodput, such as ttft=500ms,tpot=50ms", parse_objectives, None,
         "result", "SLO"),
    Flag("--out", "where the JSON goes", text, None, "result", "FILE"),
    Flag("--plot", "draw latencies and a timeline (.png, .svg, .pdf)", plot_file, None, "result",
         "FILE"),
)  # fmt: skip


def _run(values: SimpleNamespace) -> int:
    from kvrelay_bench.serve.run import run_serve

    return run_serve(values)


COMMAND = Command(
    "serve",
    "Load on any OpenAI-compatible server or a stack of its own: TTFT, ITL, TPOT, goodput.",
    (*_LOAD, *_RESULT, *_SERVER, MODEL_FLAG, *POOL_FLAGS, *STACK_FLAGS),
    _run,
    epilog="Without --rate, --concurrency and --trace: --rate 2. --prefill 0 measures the aggregated\n"
    "mode. Prompts are token ids, exact in length. Ctrl-C keeps what was measured.\n"
    "docs/sample-trace.jsonl is a trace to try: --trace docs/sample-trace.jsonl",
)
