"""What a subcommand is, and the text and parser made from it."""

import argparse
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NoReturn

from kvrelay.cli.flags import Flag
from kvrelay_protocol.errors import UsageError


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand: its flags, and a handler that imports what it needs when it runs."""

    name: str
    summary: str
    flags: Sequence[Flag]
    run: Callable[[SimpleNamespace], int]
    """Takes the resolved values, returns the exit code."""
    epilog: str = ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flag = message.removeprefix("argument ").removesuffix(": expected one argument")
        raise UsageError(message if flag == message else f"{flag} needs a value")


def build_parser(command: Command) -> argparse.ArgumentParser:
    """A parser that splits and explains ; checking values is `settings.resolve`'s."""
    parser = _Parser(
        prog=f"kvrelay {command.name}",
        usage=f"kvrelay {command.name} {_positionals(command)}[FLAG ...]",
        description=_wrapped(command.summary),
        epilog=_wrapped(command.epilog) or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in command.flags:
        if flag.positional:
            parser.add_argument(flag.dest, nargs="?", metavar=flag.metavar, help=flag.help)
            continue
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        group = groups[flag.group]
        described = flag.help + _shown_default(flag)
        if flag.switch:
            group.add_argument(
                flag.name, dest=flag.dest, action="store_const", const="true", help=described
            )
        elif flag.repeated:
            group.add_argument(
                flag.name, dest=flag.dest, action="append", metavar=flag.metavar, help=described
            )
        else:
            group.add_argument(flag.name, dest=flag.dest, metavar=flag.metavar, help=described)
    return parser


def _wrapped(text: str) -> str:
    """Its lines, none longer than a terminal of 80 columns."""
    return "\n".join(textwrap.fill(line, 80) for line in text.splitlines())


def _positionals(command: Command) -> str:
    """As the usage line shows them, each with a space behind it."""
    return "".join(
        f"{flag.metavar} " if flag.required else f"[{flag.metavar}] "
        for flag in command.flags
        if flag.positional
    )


def search_help(command: Command, word: str) -> str:
    """`--help=word`: the flags whose name or text has the word."""
    hits = [
        f"  {flag.name:<28} {flag.help}{_shown_default(flag).replace('%%', '%')}"
        for flag in command.flags
        if word.lower() in f"{flag.name} {flag.help} {flag.group}".lower()
    ]
    return "\n".join(hits) if hits else f"no flag of kvrelay {command.name} mentions {word!r}"


def _shown_default(flag: Flag) -> str:
    if flag.default in (None, (), "", False) or flag.secret:
        return ""
    return f" [{_default_text(flag)}]"


def _default_text(flag: Flag) -> str:
    if flag.metavar == "SIZE" and isinstance(flag.default, int):
        from kvrelay.cli.units import format_size

        return format_size(flag.default).replace(" ", "")
    if flag.metavar == "SECONDS":
        return f"{flag.default:g}"
    return str(flag.default)
