"""`kvrelay COMMAND ...`: find the command, resolve its values, run it, turn errors into exit codes.

Imports nothing heavy: `--help` and usage errors answer before any of torch, grpc or httpx would be
loaded.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from kvrelay.cli.command import Command, build_parser, search_help
from kvrelay.cli.settings import resolve
from kvrelay.cli.suggest import unknown
from kvrelay_protocol.errors import KvrelayError, UsageError

_COMMANDS = {
    "up": "serve a model on this machine: router, prefill and decode workers",
    "serve": "the same in one container (SageMaker, RunPod, Cloud Run): one pool",
    "chat": "talk to a model, on a server or on a stack started for it",
    "demo": "start everything, ask one question, show what happened",
    "doctor": "versions, devices, limits, and the transport between two processes",
    "bench": "measure: engine, peers, start-up, serving, transfer, router",
    "chaos": "break a stack of its own under load and judge every answer",
    "deploy": "run it on AWS: plan, apply, status, destroy",
    "weights": "upload a model to S3 with checksums",
    "simulate": "a fleet on a virtual clock, under the real scaler and placement",
    "router": "the HTTP front alone (what its container runs)",
    "prefill": "one prefill worker (what its container runs)",
    "decode": "one decode worker (what its container runs)",
}
_MODULES = {"prefill": "worker", "decode": "worker"}
_EXTRA_OF = {"router": "router", "prefill": "worker", "decode": "worker", "chat": "all",
             "chaos": "all", "deploy": "aws",
             "bench": "bench", "simulate": "bench", "weights": "aws"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KvrelayError as error:
        for line in str(error).splitlines() or [error.code]:
            # The lines of a failed worker are indented: they are a quotation, not our error.
            print(line if line.startswith(" ") else f"kvrelay: {line}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0].startswith("kvrelay"):
            raise
        command = arguments[0] if arguments else ""
        extra = _EXTRA_OF.get(command, "all")
        print(
            f"kvrelay: {command} needs the package {error.name}: pip install 'kvrelay[{extra}]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`kvrelay ... | head`); so is the reason to go on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def load_command(name: str) -> Command:
    """The declaration of a command, from its own module."""
    module = importlib.import_module(f"kvrelay.cli.commands.{_MODULES.get(name, name)}")
    command: Command = getattr(module, name.upper())
    return command


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_overview())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name in {"-V", "--version", "version"}:
        from importlib.metadata import version

        print(f"kvrelay {version('kvrelay')}")
        return 0
    if name not in _COMMANDS:
        kind = "flag" if name.startswith("-") else "command"
        known = ["--help", "--version"] if kind == "flag" else list(_COMMANDS)
        raise UsageError(f"{unknown(kind, name, known)} (kvrelay --help lists them)")
    if name != "bench":
        return _run(load_command(name), rest)
    from kvrelay.cli.commands.bench import load_benchmark, overview

    if not rest or rest[0] in {"-h", "--help", "help"}:
        print(overview())
        return 0 if rest else 2
    return _run(load_benchmark(rest[0]), rest[1:])


def _run(command: Command, rest: list[str]) -> int:
    for argument in rest:
        if argument.startswith("--help="):
            print(search_help(command, argument.removeprefix("--help=")))
            return 0
    parser = build_parser(command)
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        return 0
    parsed, leftover = parser.parse_known_args(rest)
    names = [flag.name for flag in command.flags if not flag.positional]
    problems = [
        unknown("flag", word.partition("=")[0], [*names, "--help"])
        if word.startswith("-")
        else f"unexpected argument {word}"
        for word in leftover
    ]
    return command.run(resolve(command.flags, vars(parsed), problems=problems))


def _overview() -> str:
    lines = [f"  {name:<9}{summary}" for name, summary in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: kvrelay COMMAND [ARGUMENT ...]",
            "",
            "Serve open LLMs from two pools: prefill workers read prompts, decode workers",
            "write answers, KV blocks move between them over UCX.",
            "",
            *lines,
            "",
            "kvrelay COMMAND --help explains one, --help=WORD searches its flags. Every flag",
            "is also an environment variable: --kv-memory is KVRELAY_KV_MEMORY; the argument",
            "wins.",
        ]
    )
