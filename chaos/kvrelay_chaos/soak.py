"""What the processes of a stack take of the machine, over time, and whether it grows."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression

import psutil

EVERY_S = 5.0
WARM_UP = 0.2
"""Share of a process's samples, the first ones, that say nothing yet."""
_FEWEST = 6
"""Samples that a slope needs."""
QUANTITIES = ("resident_bytes", "descriptors", "threads", "segments")


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment."""

    at: float
    """Seconds, by the monotonic clock."""
    pid: int
    resident_bytes: int
    descriptors: int
    threads: int
    segments: int
    """Mappings of shared memory."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How what one process takes has changed, by least squares after its warm-up."""

    process: str
    seconds: float
    """Between the first and the last sample that count."""
    per_hour: Mapping[str, float]
    """By quantity."""
    last: Mapping[str, int]
    """Of each quantity."""


class Sampler:
    """Looks at processes from time to time."""

    def __init__(self, pids: Callable[[], Mapping[str, int]], *, every_s: float = EVERY_S) -> None:
        """Args: `pids` gives the processes that run now by their names."""
        self.samples: dict[str, list[Sample]] = {}
        self._pids = pids
        self._every_s = every_s

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            for name, pid in self._pids().items():
                with contextlib.suppress(psutil.Error, OSError):
                    sample = take_sample(pid)
                    self.samples.setdefault(name, []).append(sample)
            await asyncio.sleep(self._every_s)

    def growth(self) -> list[Growth]:
        """Of the process of each name that was seen longest; nothing of names never seen long enough."""
        found = (growth_of(name, samples) for name, samples in sorted(self.samples.items()))
        return [growth for growth in found if growth is not None]


@asynccontextmanager
async def sampling(sampler: Sampler) -> AsyncIterator[None]:
    """Samples are taken inside."""
    task = asyncio.create_task(sampler.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def take_sample(pid: int) -> Sample:
    """Ask the kernel.

    Raises:
        psutil.Error, OSError: there is no such process any more.
    """
    process = psutil.Process(pid)
    with process.oneshot():
        return Sample(
            at=time.monotonic(),
            pid=pid,
            resident_bytes=process.memory_info().rss,
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            segments=_segments(pid),
        )


def growth_of(name: str, samples: Sequence[Sample]) -> Growth | None:
    """The slopes of the process that has the most samples; None where they are too few."""
    by_pid: dict[int, list[Sample]] = {}
    for sample in samples:
        by_pid.setdefault(sample.pid, []).append(sample)
    longest = max(by_pid.values(), key=len, default=[])
    warm = longest[int(len(longest) * WARM_UP) :]
    if len(warm) < _FEWEST:
        return None
    hours = [sample.at / 3600 for sample in warm]
    slopes = {
        quantity: linear_regression(hours, [getattr(sample, quantity) for sample in warm]).slope
        for quantity in QUANTITIES
    }
    last = {quantity: getattr(warm[-1], quantity) for quantity in QUANTITIES}
    return Growth(name, warm[-1].at - warm[0].at, slopes, last)


def _segments(pid: int) -> int:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum("/dev/shm/" in line or "/SYSV" in line for line in lines)  # noqa: S108 - looked for
