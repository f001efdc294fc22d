"""`kvrelay bench kernels`: times, floors and the table."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace

import torch

from kvrelay_bench.gpu.timing import relative_error
from kvrelay_bench.kernels.cases import Calls, Case, plan
from kvrelay_bench.machine import BusyCores, Limits, describe_machine, measure_limits, probe_limits
from kvrelay_bench.report import Table, write_report
from kvrelay_infra.host import read_cores
from kvrelay_kernels.cpu.library import CpuLibrary, cpu_library
from kvrelay_kernels.cpu.tape import Tape
from kvrelay_protocol.errors import UsageError

_ROTATING_BYTES = 256 << 20
"""More than any last-level cache holds."""
_ROUND_S = 0.05
"""A round repeats the calls for about this long, so that starting the clock costs nothing."""
_CALLS_IN_TAPE = 16
_MOST_ERROR = 2e-2
"""Of bfloat16 products in torch beside float32 ones here."""


@dataclass(frozen=True, slots=True)
class Row:
    """One op at one shape, shortest of several rounds."""

    op: str
    shape: str
    seconds: float
    torch_seconds: float | None
    nbytes: int
    flops: int
    read_floor_s: float
    multiply_floor_s: float
    error: float | None
    """Relative, of the result against torch's."""

    @property
    def share(self) -> float:
        """Of the limit that binds; above 1 where the inputs are in a cache."""
        return max(self.read_floor_s, self.multiply_floor_s) / self.seconds

    @property
    def bound(self) -> str:
        return "read" if self.read_floor_s > self.multiply_floor_s else "multiply"


def run_kernels(values: SimpleNamespace) -> int:
    """`kvrelay bench kernels`.

    Raises:
        UsageError: there are no compiled kernels, or the result cannot be written.
    """
    library = cpu_library()
    if library is None:
        raise UsageError("the CPU kernels are not built here: a C++ compiler is needed")
    threads = values.threads or read_cores()
    limits = (
        measure_limits(threads, read_bytes=1 << 20, gemm_size=64)
        if values.smoke
        else probe_limits(threads)
    )
    print(f"machine: {limits}", flush=True)
    before = library.threads, torch.get_num_threads()
    library.set_threads(threads)
    torch.set_num_threads(threads)
    cores, own = BusyCores(), time.process_time()
    try:
        rows = [
            measure(case, library, limits, values.rounds, smoke=values.smoke)
            for case in plan(values.only, smoke=values.smoke)
        ]
    finally:
        library.set_threads(before[0])
        torch.set_num_threads(before[1])
    foreign = cores.foreign_share(time.process_time() - own)
    print(f"\n{_table(rows).text()}\n")
    print(f"other processes used {foreign:.0%} of the cores meanwhile")
    path = write_report(
        "kernels",
        values,
        [{**asdict(row), "share": row.share, "bound": row.bound} for row in rows],
        describe_machine(limits),
        values.out,
        details={"foreign_share": foreign},
    )
    print(f"written: {path}")
    return 0


def measure(case: Case, library: CpuLibrary, limits: Limits, rounds: int, *, smoke: bool) -> Row:
    """Time one case, compiled and in torch by turns.

    Raises:
        AssertionError: the results differ.
    """
    count = 1
    if case.rotating_bytes and not smoke:
        count = min(max(-(-_ROTATING_BYTES // case.rotating_bytes), 1), 64)
    calls = case.make(count)
    error = relative_error(calls.native[0](), calls.torch[0]()) if calls.torch else None
    if error is not None and not error < _MOST_ERROR:
        raise AssertionError(f"{case.op} {case.shape} differs from torch by {error}")
    tape = _recorded(calls, library)
    seconds, torch_seconds = float("inf"), float("inf")
    for _ in range(rounds):
        replay = partial(tape.replay, calls.rows, 0, len(tape))
        seconds = min(seconds, _time(replay, _ROUND_S * (not smoke)) / len(tape))
        if calls.torch:
            torch_seconds = min(
                torch_seconds,
                _time(lambda: [call() for call in calls.torch], _ROUND_S * (not smoke))
                / len(calls.torch),
            )
    row = Row(
        case.op,
        case.shape,
        seconds,
        torch_seconds if calls.torch else None,
        case.nbytes,
        case.flops,
        case.nbytes / limits.read_bytes_per_s,
        # Attention computes in float32; products of 16-bit weights in whatever is fastest for them.
        case.flops
        / (limits.product_flops if case.op == "linear" else limits.gemm_flops["float32"]),
        error,
    )
    print(f"{row.op} {row.shape}: {row.seconds * 1e6:.1f} us, {row.share:.0%}", flush=True)
    return row


def _recorded(calls: Calls, library: CpuLibrary) -> Tape:
    """Calls of a round or less as one: a step is replayed, and Python costs more than a small op."""
    fit = int(_ROUND_S / _time(calls.native[0], 0.0))
    tape = Tape(library)
    with tape.recording():
        while True:
            for call in calls.native:
                call()
            if len(tape) >= min(fit, _CALLS_IN_TAPE):
                return tape


def _time(action: Callable[[], object], least_s: float) -> float:
    """Seconds of one call, averaged over as many as fit."""
    begun = time.perf_counter()
    done = 0
    while True:
        action()
        done += 1
        elapsed = time.perf_counter() - begun
        if elapsed >= least_s:
            return elapsed / done


def _table(rows: list[Row]) -> Table:
    return Table(
        ("op", "shape", "us", "GB/s", "GFLOP/s", "bound", "of limit", "torch / ours"),
        [
            (
                row.op,
                row.shape,
                row.seconds * 1e6,
                row.nbytes / row.seconds / 1e9,
                row.flops / row.seconds / 1e9,
                row.bound,
                f"{row.share:.0%}",
                None if row.torch_seconds is None else row.torch_seconds / row.seconds,
            )
            for row in rows
        ],
    )
