import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kvrelay_chaos.soak import Sample, Sampler, growth_of, sampling, take_sample

FIRST = Sample(0.0, 1, resident_bytes=1000, descriptors=10, threads=5, segments=0)


def _series(pid: int, count: int, bytes_per_s: int) -> list[Sample]:
    return [
        replace(FIRST, pid=pid, at=float(5 * n), resident_bytes=1000 + 5 * n * bytes_per_s)
        for n in range(count)
    ]


def test_growth_is_the_slope_after_the_warm_up():
    warming = [replace(sample, resident_bytes=0) for sample in _series(1, 4, 0)]
    samples = [*warming, *_series(1, 20, 2)[4:]]
    growth = growth_of("decode-0", samples)
    assert growth.per_hour["resident_bytes"] == pytest.approx(7200)
    assert growth.per_hour["descriptors"] == 0
    assert growth.last["threads"] == 5


def test_the_process_that_lived_longest_counts():
    growth = growth_of("decode-0", [*_series(1, 8, 100), *_series(2, 30, 0)])
    assert growth.per_hour["resident_bytes"] == pytest.approx(0)


def test_a_process_that_was_hardly_seen_has_no_slope():
    assert growth_of("decode-0", _series(1, 5, 1)) is None


def test_a_sample_is_what_the_kernel_says():
    sample = take_sample(os.getpid())
    with Path(os.devnull).open() as _:
        more = take_sample(os.getpid())
    assert more.descriptors == sample.descriptors + 1
    assert sample.resident_bytes > 2**20
    assert sample.threads >= 1


async def test_processes_that_are_gone_are_passed_over():
    seen = asyncio.Event()

    def pids() -> dict[str, int]:
        if sampler.samples.get("self"):
            seen.set()
        return {"gone": 2**22 + 1, "self": os.getpid()}

    sampler = Sampler(pids, every_s=0.001)
    async with sampling(sampler):
        await seen.wait()
    assert sampler.samples.keys() == {"self"}
