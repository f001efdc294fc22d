"""What a benchmark leaves behind: summaries of repeated measurements, tables, one JSON file.

The file holds everything needed to judge or repeat the run: the command line's values, versions,
commit, machine, date and one object for every row of the table.
"""

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvrelay_bench.machine import Machine
from kvrelay_protocol.errors import UsageError

_PACKAGES = ("kvrelay", "torch", "triton", "transformers", "ucxx-cu13", "grpcio", "uvicorn")


@dataclass(frozen=True, slots=True)
class Summary:
    """Order statistics of repeated measurements, in the unit of the measurements."""

    median: float
    p95: float
    p99: float
    minimum: float
    maximum: float
    count: int

    @property
    def spread(self) -> float:
        """(maximum - minimum) / median: the width of the measurements, as a fraction."""
        return (self.maximum - self.minimum) / self.median if self.median else 0.0


def percentile(values: Iterable[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between neighbours as in NumPy; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(values: Iterable[float]) -> Summary:
    """Order statistics of at least one value.

    Raises:
        ValueError: there is no value.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("nothing was measured")
    return Summary(
        median=percentile(ordered, 50),
        p95=percentile(ordered, 95),
        p99=percentile(ordered, 99),
        minimum=ordered[0],
        maximum=ordered[-1],
        count=len(ordered),
    )


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header, as monospaced text or Markdown; numbers align right."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def text(self) -> str:
        cells = self._cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        right = self._right_aligned()
        lines = [
            "  ".join(
                cell.rjust(width) if numeric else cell.ljust(width)
                for cell, width, numeric in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def markdown(self) -> str:
        rule = ["---:" if numeric else "---" for numeric in self._right_aligned()]
        first, *rest = self._cells()
        return "\n".join("| " + " | ".join(row) + " |" for row in [first, rule, *rest])

    def _cells(self) -> list[list[str]]:
        return [list(self.header), *([format_cell(cell) for cell in row] for row in self.rows)]

    def _right_aligned(self) -> list[bool]:
        return [
            any(isinstance(row[i], int | float) for row in self.rows)
            for i in range(len(self.header))
        ]


def format_cell(value: object) -> str:
    """A number with three significant digits or all of its integer part; None is a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def write_report(
    name: str,
    arguments: Mapping[str, Any] | SimpleNamespace,
    rows: Sequence[Mapping[str, Any]],
    machine: Machine,
    out: Path | None = None,
    *,
    details: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    command: str | None = None,
) -> Path:
    """Write a benchmark's result as one JSON object, whole or not at all.

    Args:
        name: of the benchmark, as typed after `kvrelay bench`.
        arguments: its resolved flags.
        rows: one mapping per row of the result, JSON values or dataclasses in it.
        machine: where it ran.
        out: the file; None picks one below `cache_dir()`.
        details: whatever else belongs to the result: series, checks, notes.
        versions: of what else took part, such as peers.
        command: what was typed, where it was not `kvrelay bench NAME`.

    Returns:
        The path written.

    Raises:
        UsageError: the file can't be written.
    """
    path = out or cache_dir() / "results" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    given = vars(arguments) if isinstance(arguments, SimpleNamespace) else arguments
    envelope = {
        "benchmark": name,
        "command": command or f"kvrelay bench {name}",
        "arguments": dict(given),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {**software_versions(), **(versions or {})},
        "commit": current_commit(),
        "machine": machine,
        "rows": rows,
        **(details or {}),
    }
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(envelope, indent=2, default=_to_json) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"--out {path} can't be written: {error.strerror}") from None
    return path


def cache_dir() -> Path:
    """Where benchmarks keep models, peers and results: XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvrelay" / "bench"


def software_versions(*further: str) -> dict[str, str]:
    """Versions of Python and of the packages that matter to speed, those that are installed."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *further):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def current_commit() -> str | None:
    """Commit of the checkout this package runs from, "-dirty" behind it where files changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty",
               "--abbrev=40", "--exclude=*"]  # fmt: skip
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _to_json(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    if isinstance(value, Path) and value.is_relative_to(Path.home()):
        # Results are published: whose home it was is nobody's business.
        return f"~/{value.relative_to(Path.home())}"
    return str(value)
