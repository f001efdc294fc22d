"""The machine under a benchmark, and its measured limits: streaming reads and matrix products.

`python -m kvrelay_bench.machine THREADS` prints the limits as JSON, so that a process which must not
keep torch's threads around can ask for them.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import psutil

from kvrelay_infra.host import read_cores, read_memory

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8",
          "asimd", "sve", "bf16", "i8mm")  # fmt: skip
_READ_BYTES = 512 * 1024 * 1024
"""More than any last-level cache holds."""
_GEMM_SIZE = 1536
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """What was measured, best of several kernels and rounds."""

    threads: int
    read_bytes_per_s: float
    gemm_flops: Mapping[str, float]
    """Operations per second of a large matrix product, by dtype; a multiply-add counts as two."""

    @property
    def product_flops(self) -> float:
        """What products of 16-bit weights could reach: the best of the floating-point dtypes, or of 16-bit
        integers, whose dot products do half of what 8-bit ones do in an instruction.
        """
        floats = [rate for dtype, rate in self.gemm_flops.items() if dtype != "int8"]
        return max(*floats, self.gemm_flops["int8"] / 2)

    def __str__(self) -> str:
        products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in self.gemm_flops.items())
        return (
            f"{self.threads} threads read {self.read_bytes_per_s / 1e9:.1f} GB/s, matrix products "
            f"in GFLOP/s: {products}"
        )


def best_limits(probes: Sequence[Limits]) -> Limits:
    """The best of several measurements with the same threads: a limit is what was once possible."""
    return Limits(
        probes[0].threads,
        max(probe.read_bytes_per_s for probe in probes),
        {dtype: max(probe.gemm_flops[dtype] for probe in probes) for dtype in probes[0].gemm_flops},
    )


class StolenTime:
    """What other guests of a virtual machine's host take while something is measured."""

    def __init__(self) -> None:
        self._begin = self._read()

    def share(self) -> float:
        """Of the processor time wanted since the beginning, the part that was not given; 0 where unknown."""
        busy, stolen = (now - then for now, then in zip(self._read(), self._begin, strict=True))
        return stolen / (busy + stolen) if busy + stolen else 0.0

    @staticmethod
    def _read() -> tuple[float, float]:
        times = psutil.cpu_times()
        # user and nice hold guest and guest_nice already
        used = times.user + times.system + getattr(times, "nice", 0.0)
        used += getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0)
        return used, getattr(times, "steal", 0.0)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a benchmark ran."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    cpu_flags: tuple[str, ...] = ()
    gpu: str | None = None
    limits: Limits | None = field(default=None)


def describe_machine(limits: Limits | None = None) -> Machine:
    """This machine as the operating system describes it; imports no torch."""
    name, flags = _read_cpuinfo()
    return Machine(
        cpu=name,
        cores=read_cores(),
        memory_bytes=read_memory().total,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu_flags=tuple(flag for flag in _FLAGS if flag in flags),
        limits=limits,
    )


def probe_limits(threads: int) -> Limits:
    """`measure_limits` in a process of its own.

    Raises:
        RuntimeError: the process failed; its last line of output says why.
    """
    command = [sys.executable, "-m", "kvrelay_bench.machine", str(threads)]
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"the machine's limits could not be measured: {last}")
    return Limits(**json.loads(done.stdout))


def measure_limits(
    threads: int, *, read_bytes: int = _READ_BYTES, gemm_size: int = _GEMM_SIZE
) -> Limits:
    """Stream a large buffer and multiply large matrices, with torch.

    A single library call may miss the limit (a reduction can be bound by its additions), so the
    fastest of several counts.

    Args:
        threads: intra-op threads to use.
        read_bytes: size of the buffer that is read.
        gemm_size: n of the n x n x n products.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Limits(threads, _measure_read(read_bytes), _measure_gemm(gemm_size))
    finally:
        torch.set_num_threads(before)


def _measure_read(size: int) -> float:
    import torch

    floats = torch.ones(size // 4)
    rows = floats.view(-1, 4096) if size >= 4096 * 4 else floats.view(1, -1)
    vector = torch.ones(rows.shape[1])
    readers: list[Callable[[], object]] = [
        lambda: floats.view(torch.int64).sum(),
        floats.sum,
        floats.amax,
        lambda: rows @ vector,
    ]
    return size / min(_best_time(reader) for reader in readers)


def _measure_gemm(size: int) -> dict[str, float]:
    import torch

    rates: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.ones(size, size, dtype=dtype)
        rates[str(dtype).removeprefix("torch.")] = _rate(size, partial(torch.mm, left, left))
    integers = torch.ones(size, size, dtype=torch.int8)
    rates["int8"] = _rate(size, partial(torch._int_mm, integers, integers))  # noqa: SLF001 # no public name
    return rates


def _rate(size: int, product: Callable[[], object]) -> float:
    return 2.0 * size**3 / _best_time(product)


def _best_time(action: Callable[[], object]) -> float:
    action()
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return best


class BusyCores:
    """How much of the machine others used, from its construction on."""

    def __init__(self) -> None:
        self._begun, self._busy = time.monotonic(), _busy_core_seconds()

    def foreign_share(self, own_cpu_seconds: float) -> float:
        """Share of all core time that neither was idle nor was `own_cpu_seconds`, 0 to 1."""
        elapsed = time.monotonic() - self._begun
        foreign = _busy_core_seconds() - self._busy - own_cpu_seconds
        return min(1.0, max(0.0, foreign / (elapsed * (os.cpu_count() or 1))))


def _busy_core_seconds() -> float:
    """Time in which a core was not idle (proc(5), stat: user, nice, system, irq, softirq, steal)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _read_cpuinfo(path: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        lines = []
    entries = dict(reversed([_split(line) for line in lines if ":" in line]))
    flags = entries.get("flags") or entries.get("Features") or ""
    return entries.get("model name") or platform.machine(), frozenset(flags.split())


def _split(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


if __name__ == "__main__":
    print(json.dumps(asdict(measure_limits(int(sys.argv[1])))))
