"""What is said of the machine, and its limits."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

import psutil
import pytest
import torch

from kvrelay_bench.machine import (
    BusyCores,
    Limits,
    best_limits,
    describe_machine,
    measure_limits,
    probe_limits,
)


def test_the_description_needs_no_torch():
    code = (
        "import sys; from kvrelay_bench.machine import describe_machine; machine = describe_machine();"
        "assert machine.cpu and machine.cores >= 1 and machine.memory_bytes > 1 << 20;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_limits_of_small_buffers_are_measured_and_threads_put_back():
    before = torch.get_num_threads()
    limits = measure_limits(1, read_bytes=1 << 20, gemm_size=64)
    assert torch.get_num_threads() == before
    assert limits.threads == 1
    assert limits.read_bytes_per_s > 1e8
    assert set(limits.gemm_flops) == {"float32", "bfloat16", "int8"}
    assert min(limits.gemm_flops.values()) > 0
    assert json.loads(json.dumps(asdict(limits))) == asdict(limits)


def test_products_of_16_bits_may_use_integers_at_half_the_rate_of_8_bits():
    assert Limits(1, 1.0, {"float32": 2.0, "bfloat16": 3.0, "int8": 5.0}).product_flops == 3.0
    assert Limits(1, 1.0, {"float32": 2.0, "bfloat16": 3.0, "int8": 8.0}).product_flops == 4.0


def test_the_best_of_several_probes_counts():
    first = Limits(2, 10.0, {"float32": 5.0, "int8": 1.0})
    second = Limits(2, 8.0, {"float32": 6.0, "int8": 0.5})
    assert best_limits([first, second]) == Limits(2, 10.0, {"float32": 6.0, "int8": 1.0})


def test_a_probe_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="limits could not be measured: no output"):
        probe_limits(1)


def test_other_processes_show_as_foreign_and_our_own_do_not():
    busy, began = BusyCores(), time.monotonic()
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while psutil.Process(spin.pid).cpu_times().user < 0.2:
            time.sleep(0.02)
    finally:
        spin.kill()
        spin.wait()
    assert 0.0 < busy.foreign_share(0.0) <= 1.0
    every_core = (time.monotonic() - began) * (os.cpu_count() or 1)
    assert busy.foreign_share(10 * every_core) == 0.0


def test_limits_are_described_with_their_threads():
    machine = describe_machine(Limits(2, 1e10, {"float32": 1e11}))
    assert str(machine.limits) == (
        "2 threads read 10.0 GB/s, matrix products in GFLOP/s: float32 100"
    )
