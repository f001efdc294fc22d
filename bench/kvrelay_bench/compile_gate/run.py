"""Compile every case, print what became of it, and the floors of the work."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvrelay_bench.machine import describe_machine
from kvrelay_bench.report import Table, write_report
from kvrelay_protocol.errors import UsageError

if TYPE_CHECKING:
    from kvrelay_kernels.cuda.compile import Compiled
    from kvrelay_kernels.cuda.registry import Workload


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """Rates measured on one GPU of a kind."""

    bytes_per_s: float
    """Device-to-device copy of gigabytes, bytes read plus bytes written."""
    flops: float
    """bfloat16 product of 8192 x 8192 x 8192 on random data."""


GPU_LIMITS = {"H100": GpuLimits(3.0e12, 798e12), "H200": GpuLimits(4.3e12, 788e12)}
"""`kvrelay bench gpu` measures them again on the GPU it runs on."""


def run_compile_gate(values: SimpleNamespace) -> int:
    """Exit code 1 if a case fails.

    Raises:
        UsageError: triton is not installed, or no kernel has the name.
    """
    if find_spec("triton") is None:
        raise UsageError("triton is not installed: pip install 'triton>=3.6,<3.8'")
    from kvrelay_kernels.cuda.compile import compile_case
    from kvrelay_kernels.cuda.registry import all_cases, all_workloads

    cases = [case for case in all_cases() if not values.only or values.only in case.name]
    if not cases:
        names = ", ".join(sorted({case.name for case in all_cases()}))
        raise UsageError(f"--only {values.only} is in no kernel's name; there are {names}")
    done = [compile_case(case, target) for case in cases for target in case.expect]
    work = [_floors(workload) for workload in all_workloads()]
    print(compiled_table(done).text())
    print()
    print(work_table(work).text())
    path = write_report(
        "compile-gate", values, [asdict(one) for one in done], describe_machine(), values.out,
        details={"workloads": work, "gpu_limits": GPU_LIMITS},
    )  # fmt: skip
    failed = [one for one in done if one.failures]
    for one in failed:
        print(f"{one.kernel} ({one.variant}) on sm_{one.target}: {'; '.join(one.failures)}")
    print(f"\n{len(done) - len(failed)} of {len(done)} as expected. {path}")
    return 1 if failed else 0


def compiled_table(done: Sequence["Compiled"]) -> Table:
    """A row for each kernel and target."""
    return Table(
        ("kernel", "variant", "target", "registers", "stack B", "shared KiB", "programs/SM", "instructions"),
        [
            (
                one.kernel, one.variant, f"sm_{one.target}", one.registers, one.stack_bytes,
                one.shared_bytes / 1024, one.blocks_per_sm,
                ", ".join(f"{count} {name}" for name, count in one.instructions.items()),
            )
            for one in done
        ],
    )  # fmt: skip


def work_table(work: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each workload: its floor on each GPU and what is expected until it is measured."""
    columns = [f"{gpu} {what} us" for gpu in GPU_LIMITS for what in ("floor", "expected")]
    return Table(
        ("op", "shape", "dtype", "MB", "GFLOP", *columns, "because"),
        [
            (
                row["op"], row["shape"], row["dtype"], row["bytes"] / 1e6, row["flops"] / 1e9,
                *(row[what][gpu] for gpu in GPU_LIMITS for what in ("floor_us", "expected_us")),
                row["because"],
            )
            for row in work
        ],
    )  # fmt: skip


def _floors(workload: "Workload") -> dict[str, Any]:
    floors = {
        gpu: 1e6 * max(workload.bytes / limits.bytes_per_s, workload.flops / limits.flops)
        for gpu, limits in GPU_LIMITS.items()
    }
    expected = {
        gpu: max(workload.latency_us, floor / workload.expected_share)
        for gpu, floor in floors.items()
    }
    return {**asdict(workload), "floor_us": floors, "expected_us": expected}
