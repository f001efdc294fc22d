"""`kvrelay bench gpu` without a GPU: its arithmetic, its rows, and every path once on the CPU."""

import json
import math
import time

import pytest
import torch

from kvrelay.cli.main import main
from kvrelay_bench.gpu.run import measure
from kvrelay_bench.gpu.timing import Stopwatch, poisoned, relative_error
from kvrelay_bench.gpu.work import (
    HEADER,
    AttentionShape,
    Ceilings,
    Job,
    ModelShape,
    Row,
    full_plan,
    rotations,
)
from kvrelay_protocol.errors import UsageError

H200 = Ceilings(bytes_per_s=4.8e12, flops=989e12, l2_bytes=50 << 20)


def test_the_roofline_of_an_8b_step_is_the_published_one():
    """Facts of the model: 15.0 GB a step, 131,072 B of KV a token, 317 tokens/s at 4.8 TB/s."""
    model = ModelShape()
    assert model.kv_token_bytes == 131072
    assert 2 * model.step_parameters == pytest.approx(15.0e9, rel=0.005)
    for batch, rate in ((1, 317), (32, 7957), (256, 23181)):
        floor = model.step_floor_s(H200, batch, 1024)
        assert batch / floor == pytest.approx(rate, rel=0.01)
        assert floor >= H200.floor_s(model.step_bytes(batch, 1024), model.step_flops(batch, 1024))


def test_attention_counts_visible_pairs_and_every_byte_once():
    shape = AttentionShape("x", (3, 5), new_tokens=2, heads=4, kv_heads=2, head_dim=8)
    visible = (2 + 3) + (4 + 5)
    assert shape.flops == 4 * visible * 4 * 8
    assert shape.kv_bytes == 2 * (3 + 5) * 2 * 8 * 2
    assert shape.nbytes == shape.kv_bytes + 2 * (4 * 4 * 8 * 2)
    assert AttentionShape("x", (64,), cache="float8_e4m3fn").kv_bytes * 2 == (
        AttentionShape("x", (64,)).kv_bytes
    )


def test_the_plan_has_what_the_goals_name():
    plan = full_plan()
    mixed = [shape for shape in plan.decode if len(set(shape.context_lens)) > 1]
    assert {shape.context_lens for shape in mixed} == {(131072, *(4096,) * 31)}
    assert {shape.cache for shape in mixed} == {"bfloat16", "float8_e4m3fn"}
    assert sorted(shape.new_tokens for shape in plan.prefill) == [1024, 4096, 8192, 16384]
    assert [point.batch for point in plan.points] == [1, 32, 256]


@pytest.mark.parametrize(("nbytes", "count"), [(1, 64), (100 << 20, 2), (1 << 30, 1)])
def test_inputs_rotate_through_more_than_the_cache(nbytes, count):
    assert rotations(nbytes, 50 << 20) == count


def test_a_row_shows_its_share_its_baseline_and_a_wrong_result():
    row = Row("ops", "x", "1 x 2", nbytes=4.8e9, flops=1e9, seconds=2e-3, floor_seconds=1e-3,
              error=math.nan, tolerance=1e-2, baselines={"SDPA": 3e-3})  # fmt: skip
    assert row.share == 0.5
    assert row.wrong
    cells = dict(zip(HEADER, row.cells(), strict=True))
    assert cells["of roofline"] == "50%"
    assert cells["GB/s"] == pytest.approx(2400)
    assert cells["speed against"] == "1.50x SDPA"
    assert cells["check"] == "WRONG"
    assert json.loads(json.dumps(row.to_json()))["share"] == 0.5


def job(name, run):
    return Job("ops", name, "", run)


def test_a_job_that_fails_costs_its_own_row_alone():
    def broken():
        raise RuntimeError("no kernel image\nand more")

    good = Row("ops", "good", "", seconds=1.0)
    jobs = [job("broken", broken), job("good", lambda: good)]
    first, second = measure(jobs, deadline=time.monotonic() + 60)
    assert first.unmeasured == "failed: RuntimeError: no kernel image"
    assert second is good


def test_past_the_budget_rows_say_so():
    def never():
        raise AssertionError

    (row,) = measure([job("late", never)], deadline=time.monotonic() - 1)
    assert row.unmeasured == "not measured: --budget was spent"
    assert len(row.cells()) == len(HEADER)


def test_a_check_sees_what_was_not_written():
    expected = torch.ones(4)
    out = poisoned(expected)
    out[:3] = 1
    assert math.isnan(relative_error(out, expected))
    assert relative_error(expected * 1.5, expected) == 0.5


def test_the_stopwatch_goes_round_its_calls():
    seen = []
    watch = Stopwatch(torch.device("cpu"), warm_ms=0, measure_ms=0)
    timed = watch.time([lambda: seen.append(0), lambda: seen.append(1)])
    assert timed.graph is None
    assert timed.seconds == timed.eager > 0
    assert seen[:6] == [0, 1, 0, 1, 0, 1]


def test_without_a_gpu_one_line_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from kvrelay_bench.gpu.command import COMMAND

    values = {flag.dest: flag.default for flag in COMMAND.flags}
    from types import SimpleNamespace

    with pytest.raises(UsageError, match=r"needs an NVIDIA GPU.*--smoke"):
        COMMAND.run(SimpleNamespace(**values))
    with pytest.raises(UsageError, match="only --smoke runs on a CPU"):
        COMMAND.run(SimpleNamespace(**{**values, "device": "cpu"}))


def test_a_smoke_run_measures_every_row_and_finds_all_right(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert main(["bench", "gpu", "--smoke", "--device", "cpu", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert {row["part"] for row in rows} == {"decode", "prefill", "ops", "model", "peers"}
    assert [row for row in rows if row["unmeasured"]] == []
    assert all(row["seconds"] > 0 and row["floor_seconds"] > 0 for row in rows)
    assert not any(row["wrong"] for row in rows)
    assert report["ceilings"]["bytes_per_s"] > 0
    assert "of roofline" in capsys.readouterr().out
