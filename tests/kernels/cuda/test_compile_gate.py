"""Every Triton kernel compiles for every target without spills and with the instructions meant."""

import json
from types import SimpleNamespace

import pytest
from triton.runtime import JITFunction

from kvrelay_bench.compile_gate.run import run_compile_gate
from kvrelay_kernels.cuda.compile import blocks_per_sm, compile_case
from kvrelay_kernels.cuda.registry import (
    LAUNCH_US,
    AotCase,
    Expect,
    all_cases,
    all_workloads,
    kernel_modules,
)
from kvrelay_protocol.errors import UsageError


def _tested():
    """Every target of a kernel's first case, and Hopper of the others; `kvrelay bench` takes all."""
    seen = set()
    for case in all_cases():
        targets = (90,) if case.name in seen else case.tested
        seen.add(case.name)
        yield from ((case, target) for target in targets if target in case.expect)


TESTED = list(_tested())


@pytest.fixture(autouse=True)
def _compiled_afresh(tmp_path, monkeypatch):
    """A cached compilation would hide a compiler that no longer works."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("case", "target"),
    TESTED,
    ids=[f"{case.name}-{case.variant.replace(' ', '')}-sm_{target}" for case, target in TESTED],
)
def test_a_kernel_compiles_to_what_it_should(case, target):
    assert compile_case(case, target).failures == ()


def test_every_kernel_has_a_case():
    kernels = {
        function.__name__
        for module in kernel_modules()
        for function in vars(module).values()
        if isinstance(function, JITFunction) and function.__name__.endswith("_kernel")
    }
    assert kernels == {case.kernel.__name__ for case in all_cases()}


def test_every_target_of_every_kernel_is_one_that_a_case_names():
    for case in all_cases():
        assert set(case.expect) <= {80, 90, 100}
        assert set(case.tested) <= {80, 90, 100}
        assert set(case.divisible) <= set(case.signature)


def test_a_missing_instruction_too_few_programs_and_spills_fail():
    case = next(case for case in all_cases() if case.name == "tile_map")
    expect = Expect(
        instructions={"wgmma": 1, "ld.global 16B": 0},
        blocks_per_sm=33,
        options={"maxnreg": 24, "num_warps": 1},
    )
    failures = compile_case(
        AotCase(
            kernel=case.kernel,
            variant="",
            signature=case.signature,
            constexprs=case.constexprs,
            divisible=case.divisible,
            expect={90: expect},
        ),
        90,
    ).failures
    text = "; ".join(failures)
    assert "wgmma: 0, expected at least 1" in text
    assert "bytes of stack" in text
    assert "expected at least 33" in text
    assert "ld.global" not in text


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (128, 32, 0, 16),
        (1024, 32, 0, 2),
        (256, 255, 0, 1),
        (128, 40, 100 << 10, 2),
        (32, 16, 0, 32),
    ],
)
def test_programs_per_multiprocessor(threads, registers, shared, blocks):
    given = {"threads": threads, "registers": registers, "shared_bytes": shared}
    assert blocks_per_sm(90, **given) == blocks


def test_the_command_writes_what_was_compiled_and_the_floors(tmp_path, capsys):
    out = tmp_path / "gate.json"
    assert run_compile_gate(SimpleNamespace(only="tile_map", out=out)) == 0
    written = json.loads(out.read_text())
    assert {row["target"] for row in written["rows"]} == {80, 90, 100}
    assert not any(row["failures"] for row in written["rows"])
    assert {"H100", "H200"} == set(written["workloads"][0]["floor_us"])
    assert "tile_map" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--only nothing is in no kernel's name"):
        run_compile_gate(SimpleNamespace(only="nothing", out=out))


def test_every_kernel_is_part_of_a_workload():
    named = {name for workload in all_workloads() for name in workload.kernels}
    assert named == {case.name for case in all_cases()}


def test_workloads_are_possible():
    workloads = all_workloads()
    assert workloads
    for workload in workloads:
        assert workload.bytes > 0
        assert workload.flops >= 0
        assert 0 < workload.expected_share <= 1
        assert workload.because
        assert workload.latency_us >= LAUNCH_US
