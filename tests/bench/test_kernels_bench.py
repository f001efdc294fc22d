"""`kvrelay bench kernels`: what it counts, and every path once."""

import json

import pytest

from kvrelay.cli.main import main
from kvrelay_bench.kernels.cases import attention_case, linear_case, plan
from kvrelay_bench.models import MODELS
from kvrelay_kernels.cpu.library import cpu_library


def test_attention_counts_the_pairs_that_are_seen_and_each_key_once():
    case = attention_case("prefill", MODELS["tiny"], [2, 1], [5, 3])
    seen = 4 + 5 + 3
    assert case.flops == 4 * seen * 4 * 16
    assert case.nbytes == 2 * (5 + 3) * 2 * 16 * 2 + 2 * 3 * 4 * 16 * 4


def test_a_projection_counts_its_weights_in_their_own_size():
    import torch

    case = linear_case(3, 64, 96, torch.int8)
    assert case.flops == 2 * 3 * 64 * 96
    assert case.nbytes == 64 * 96 + 4 * 3 * (64 + 96)


def test_the_parts_make_up_the_whole():
    parts = ("attention", "linear", "elementwise")
    names = [(case.op, case.shape) for part in parts for case in plan(part)]
    assert names == [(case.op, case.shape) for case in plan()]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(cpu_library() is None, reason="no C++ compiler")
def test_every_op_is_measured_and_agrees_with_torch(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--smoke", "--rounds", "1", "--threads", "1",
                 "--out", str(out)]) == 0  # fmt: skip
    result = json.loads(out.read_text())
    assert [row["op"] for row in result["rows"]] == [
        "decode attention", "linear", "linear", "rms_norm", "add_rms_norm", "silu_mul",
        "rotary_kv_write",
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["seconds"] > 0
        assert row["error"] is None or row["error"] < 2e-2
    assert "torch / ours" in capsys.readouterr().out


@pytest.mark.skipif(cpu_library() is None, reason="no C++ compiler")
def test_threads_are_put_back(tmp_path):
    library = cpu_library()
    library.set_threads(1)
    main(["bench", "kernels", "--smoke", "--only", "elementwise", "--rounds", "1", "--threads",
          "3", "--out", str(tmp_path / "out.json")])  # fmt: skip
    assert library.threads == 1
