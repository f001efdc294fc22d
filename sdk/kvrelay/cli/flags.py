"""What a flag is: one declaration gives the argument, the environment variable and the check."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvrelay.cli.units import parse_duration, parse_size

Parse = Callable[[str], Any]
"""Text to value; a `ValueError` says what the value must be."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One setting of a command."""

    name: str
    """With its dashes, or a bare word for the positional argument."""
    help: str
    parse: Parse
    default: Any = None
    group: str = "options"
    metavar: str | None = None
    repeated: bool = False
    """May be given several times; the environment variable holds a comma-separated list."""
    switch: bool = False
    """Takes no value."""
    secret: bool = False
    """Handed to child processes through the environment, never shown."""
    required: bool = False

    @property
    def dest(self) -> str:
        return self.name.lstrip("-").replace("-", "_")

    @property
    def variable(self) -> str:
        return f"KVRELAY_{self.dest.upper()}"

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")


def text(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


def integer(low: int, high: int | None = None) -> Parse:
    expected = f"at least {low}" if high is None else f"from {low} to {high}"

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            raise ValueError(f"must be a whole number {expected}")
        return number

    return parse


class Bounds(NamedTuple):
    """At least and at most so many; as text what `bounds` reads."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"


def bounds(value: str) -> Bounds:
    """`MIN:MAX`, or one number for both."""
    low, colon, high = value.partition(":")
    try:
        found = Bounds(int(low), int(high if colon else low))
    except ValueError:
        found = Bounds(-1, -1)
    if not 0 <= found.low <= found.high:
        raise ValueError("must be MIN:MAX, whole numbers with 0 <= MIN <= MAX")
    return found


def number(low: float, high: float) -> Parse:
    def parse(value: str) -> float:
        try:
            result = float(value)
        except ValueError:
            result = float("nan")
        if not low <= result <= high:
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return result

    return parse


def size(low: int = 1) -> Parse:
    def parse(value: str) -> int:
        result = parse_size(value)
        if result < low:
            raise ValueError(f"must be at least {low} bytes")
        return result

    return parse


def duration(low: float = 0.0) -> Parse:
    def parse(value: str) -> float:
        result = parse_duration(value)
        if result < low:
            raise ValueError(f"must be at least {low:g} seconds")
        return result

    return parse


def choice(*allowed: str) -> Parse:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"must be {' or '.join(allowed)}")
        return value

    return parse


def boolean(value: str) -> bool:
    if value.lower() in {"1", "true", "yes", "on"}:
        return True
    if value.lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError("must be true or false")


def existing_file(value: str) -> Path:
    path = Path(value).expanduser()
    if not path.is_file():
        raise ValueError("is no file here")
    return path.resolve()


def base_url(value: str) -> str:
    """A URL of http or https that names a host."""
    scheme, separator, rest = value.partition("://")
    if scheme.lower() not in {"http", "https"} or not separator or not rest.strip("/"):
        raise ValueError("must be a URL such as http://127.0.0.1:8000")
    return value


def addresses(value: str) -> str:
    """One host:port or several, separated by commas, none twice."""
    each = [address(item.strip()) for item in value.split(",")]
    if len(set(each)) < len(each):
        raise ValueError("must not name a router twice")
    return ",".join(each)


def address(value: str) -> str:
    """host:port, the port within range."""
    host, colon, port = value.rpartition(":")
    if "/" in value or not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError("must be host:port, such as 10.0.0.7:8001")
    return value


def api_key(value: str) -> str:
    if not value or "," in value or not value.isprintable() or " " in value:
        raise ValueError("must be printable, without spaces or commas")
    return value


def names(value: str) -> str:
    """Names of transports, comma-separated."""
    items = [item.strip() for item in value.split(",")]
    if not all(item and item.replace("_", "").isalnum() for item in items):
        raise ValueError("must be names such as cuda_ipc or rc,dc")
    return ",".join(items)


def device(value: str) -> str:
    """auto, cpu or cuda; with a number behind it, the device of that index."""
    kind, colon, index = value.partition(":")
    if kind not in {"auto", "cpu", "cuda"} or (colon and not index.isdigit()):
        raise ValueError("must be cpu, cuda, cuda:N or auto")
    return value


def to_arguments(flags: Sequence[Flag], values: Any) -> list[str]:
    """The command line that gives another process these values; secrets are left out."""
    arguments: list[str] = []
    for flag in flags:
        value = getattr(values, flag.dest, flag.default)
        if flag.secret or flag.positional or value is None or value is False:
            continue
        if flag.switch:
            arguments.append(flag.name)
            continue
        items = value if flag.repeated else [value]
        # One argument each, so that a value may begin with a dash.
        arguments.extend(f"{flag.name}={item}" for item in items)
    return arguments


def to_environment(flags: Sequence[Flag], values: Any) -> dict[str, str]:
    """The secrets `to_arguments` left out; empty ones hide what we inherited ourselves.

    So do those of flags that `values` says nothing of: they are not for our children.
    """
    secrets = [flag for flag in flags if flag.secret]
    unknown = [flag for flag in flags if not hasattr(values, flag.dest)]
    return {flag.variable: "" for flag in unknown} | {
        flag.variable: ",".join(getattr(values, flag.dest))
        if flag.repeated
        else getattr(values, flag.dest) or ""
        for flag in secrets
    }
