"""Argument, then environment, then default. The only file of the command that reads the environment.

`KVRELAY_<FLAG>` stands for every flag: `--kv-memory` is `KVRELAY_KV_MEMORY`. An empty variable counts
as unset. All bad values are reported together.
"""

import os
import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from kvrelay.cli.flags import Flag
from kvrelay_protocol.errors import UsageError

_SECRET_WORDS = frozenset({"KEY", "KEYS", "TOKEN", "SECRET", "PASSWORD", "HEADERS", "CREDENTIALS"})
_PREFIXES = (
    "KVRELAY_",
    "UCX_",
    "UCXX_",
    "OTEL_",
    "CUDA_",
    "NVIDIA_",
    "OMP_",
    "MKL_",
    "HF_",
    "NCCL_",
)
_EXACT = ("OPENBLAS_NUM_THREADS", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV",
          "TORCH_NUM_THREADS", "MALLOC_ARENA_MAX", "TOKENIZERS_PARALLELISM")  # fmt: skip


def resolve(
    flags: Sequence[Flag],
    given: Mapping[str, Any],
    *,
    environ: Mapping[str, str] = os.environ,
    problems: Sequence[str] = (),
) -> SimpleNamespace:
    """Checked values by `Flag.dest`.

    Args:
        flags: what the command takes.
        given: what the command line said: text, a list of texts, or None.
        environ: where `KVRELAY_*` is looked up.
        problems: what is known to be wrong already; reported along with the rest.

    Raises:
        UsageError: one line for every bad value, naming where it came from and what it must be.
    """
    found = list(problems)
    values: dict[str, Any] = {}
    for flag in flags:
        try:
            values[flag.dest] = _value(flag, given.get(flag.dest), environ)
        except ValueError as error:
            found.append(str(error))
    if found:
        raise UsageError("\n".join(found))
    return SimpleNamespace(**values)


def _value(flag: Flag, given: Any, environ: Mapping[str, str]) -> Any:
    if given is not None:
        texts = given if isinstance(given, list) else [given]
        origin = "" if flag.switch else f"{flag.name} "
    elif environ.get(flag.variable):
        raw = environ[flag.variable]
        texts = [item.strip() for item in raw.split(",")] if flag.repeated else [raw]
        origin = f"{flag.variable}="
    elif flag.required:
        raise ValueError(f"{flag.name} is missing (or {flag.variable})")
    else:
        return flag.default
    parsed = [_parse(flag, item, origin) for item in texts]
    return tuple(parsed) if flag.repeated else parsed[-1]


def _parse(flag: Flag, item: str, origin: str) -> Any:
    try:
        return flag.parse(item)
    except ValueError as error:
        shown = "***" if flag.secret else item or "''"
        raise ValueError(f"{origin}{shown} {error}") from None


def own_environment() -> Mapping[str, str]:
    """What a platform or an image has set; empty variables count as unset."""
    return {name: value for name, value in os.environ.items() if value}


def own_thread_setting(environ: Mapping[str, str] = os.environ) -> int | None:
    """OMP_NUM_THREADS, where the user chose it."""
    chosen = environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) > 0 else None


def set_threads(count: int) -> None:
    """Limit the numeric libraries of this process; they read it once, when first imported."""
    os.environ.update(thread_environment(count))


def thread_environment(count: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(count))


def relevant_environment(environ: Mapping[str, str] = os.environ) -> list[tuple[str, str]]:
    """Variables that change how kvrelay runs, secrets masked."""
    return [
        (name, _masked(name, value))
        for name, value in sorted(environ.items())
        if name.startswith(_PREFIXES) or name in _EXACT
    ]


def _masked(name: str, value: str) -> str:
    if value and not _SECRET_WORDS.isdisjoint(name.split("_")):
        return f"*** ({len(value)} characters)"
    # A URL may carry a user and a password.
    return re.sub(r"//[^/@\s]+@", "//***@", value)
