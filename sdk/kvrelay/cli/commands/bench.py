"""`kvrelay bench NAME`: the benchmarks live in the package kvrelay_bench, a folder each."""

import importlib
import pkgutil
import textwrap
from dataclasses import replace
from importlib.util import find_spec

from kvrelay.cli.command import Command
from kvrelay.cli.suggest import unknown
from kvrelay_protocol.errors import UsageError


def benchmark_names() -> list[str]:
    """Folders of kvrelay_bench that have a `command` module, as they are typed."""
    import kvrelay_bench

    found = [
        module.name
        for module in pkgutil.iter_modules(kvrelay_bench.__path__)
        if module.ispkg and find_spec(f"kvrelay_bench.{module.name}.command")
    ]
    return [name.replace("_", "-") for name in sorted(found)]


def load_benchmark(name: str) -> Command:
    """The declaration of a benchmark, from its own `command` module.

    Raises:
        UsageError: there is none of that name.
    """
    known = benchmark_names()
    if name not in known:
        kind = "flag" if name.startswith("-") else "benchmark"
        near = unknown(kind, name, ["--help"] if kind == "flag" else known)
        raise UsageError(f"{near} (kvrelay bench --help lists them)")
    module = importlib.import_module(f"kvrelay_bench.{name.replace('-', '_')}.command")
    command: Command = module.COMMAND
    return replace(command, name=f"bench {name}")


def overview() -> str:
    """What `kvrelay bench --help` prints: every benchmark with its summary."""
    commands = {name: load_benchmark(name) for name in benchmark_names()}
    return "\n".join(
        [
            "usage: kvrelay bench NAME [FLAG ...]",
            "",
            "Measure this machine and write the result as a table and as JSON.",
            "",
            *(_entry(name, command.summary) for name, command in commands.items()),
            "",
            "kvrelay bench NAME --help explains one, --help=WORD searches its flags.",
        ]
    )


def _entry(name: str, summary: str) -> str:
    return textwrap.fill(summary, 79, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16)
