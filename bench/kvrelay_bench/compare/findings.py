"""Everything a comparison has found out so far, and how it is shown and kept."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvrelay_bench.compare.agreement import Agreement
from kvrelay_bench.compare.engines import OURS, OURS_INT8, OURS_NAMES
from kvrelay_bench.compare.processes import EngineSpec, Start
from kvrelay_bench.compare.result import (
    Measurement,
    Row,
    best_peer,
    compare_table,
    make_rows,
    verdicts,
)
from kvrelay_bench.machine import Limits, best_limits, describe_machine
from kvrelay_bench.models import ModelShape
from kvrelay_bench.report import Table, write_report


@dataclass(slots=True)
class Findings:
    """Filled in as the comparison goes; readable at any time."""

    shape: ModelShape
    specs: dict[str, EngineSpec] = field(default_factory=dict)
    starts: dict[str, Start] = field(default_factory=dict)
    notes: dict[str, Mapping[str, str]] = field(default_factory=dict)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    measured: list[Measurement] = field(default_factory=list)
    probes: list[Limits] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def limits(self) -> Limits | None:
        """The best of all probes: a limit is what was possible at some time."""
        return best_limits(self.probes) if self.probes else None

    @property
    def rows(self) -> list[Row]:
        return make_rows(self.measured, self.specs, self.shape, self.limits)

    @property
    def unsound(self) -> list[str]:
        """Engines that compute another model than the reference."""
        return [name for name, found in self.agreements.items() if not found.sound]

    def text(self) -> str:
        """Tables and verdicts, as printed at the end."""
        rows = self.rows
        parts = [
            compare_table(rows, OURS_NAMES).text(),
            "\n".join(verdicts(rows, OURS, OURS_INT8)),
            self._engine_table().text(),
            "\n".join(f"left out: {name}: {reason}" for name, reason in self.left_out.items()),
        ]
        return "\n\n".join(part for part in parts if part)

    def write(self, arguments: SimpleNamespace, out: Path) -> Path:
        """Write what is known as JSON.

        Raises:
            UsageError: the file can't be written.
        """
        rows = self.rows
        details: dict[str, Any] = {
            "verdicts": verdicts(rows, OURS, OURS_INT8),
            "starts": self.starts,
            "notes": self.notes,
            "agreement_with_float32": self.agreements,
            "left_out": self.left_out,
            "limit_probes": self.probes,
            "calls": [{**asdict(call), "point": str(call.point)} for call in self.measured],
        }
        return write_report(
            "compare",
            arguments,
            [_entry(row, best_peer(rows, row, OURS_NAMES)) for row in rows],
            describe_machine(self.limits),
            out,
            details=details,
            versions={
                f"{name}: {package}": version
                for name, start in self.starts.items()
                for package, version in start.versions.items()
            },
        )

    def _engine_table(self) -> Table:
        return Table(
            ("engine", "start s", "versions", "beside float32"),
            [
                (
                    name,
                    start.ready_s,
                    " ".join(f"{key} {value}" for key, value in start.versions.items()),
                    str(self.agreements.get(name, "not checked")),
                )
                for name, start in self.starts.items()
            ],
        )


def _entry(row: Row, best: Row | None) -> dict[str, Any]:
    return {
        **row.to_json(),
        "best_peer": best.engine if best else None,
        "ratio_to_best_peer": row.rate / best.rate if best else None,
    }
