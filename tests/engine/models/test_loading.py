"""From a folder to a runner, and the choice of dtype."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

from kvrelay_engine import loading
from kvrelay_engine.models.weights import load_model_config


def test_load_engine_builds_a_runner():
    calls = []
    runner = loading.load_engine(
        tiny_model("qwen3"),
        device="cpu",
        dtype="bfloat16",
        num_blocks=5,
        block_size=8,
        progress=lambda *call: calls.append(call),
    )
    assert runner.dtype == runner.pool.dtype == torch.bfloat16
    assert runner.pool.tensor.shape == (3, 2, 5, 8, 2, 32)
    assert runner.config == load_model_config(tiny_model("qwen3"))
    assert calls


@pytest.mark.parametrize(
    ("stored", "device", "native", "expected"),
    [
        ("bfloat16", "cuda", False, "bfloat16"),
        ("float16", "cuda", False, "float16"),
        ("float32", "cuda", False, "float32"),
        ("float64", "cuda", False, "float32"),
        ("bfloat16", "cpu", True, "bfloat16"),
        ("bfloat16", "cpu", False, "float32"),
        ("float16", "cpu", True, "float32"),
        ("float32", "cpu", True, "float32"),
    ],
)
def test_auto_dtype(stored, device, native, expected, monkeypatch):
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: native)
    config = replace(load_model_config(tiny_model("llama2")), checkpoint_dtype=stored)
    assert loading.resolve_dtype("auto", config, device) == expected


def test_a_named_dtype_is_taken_and_an_unknown_one_refused():
    config = load_model_config(tiny_model("llama2"))
    assert loading.resolve_dtype("float16", config, "cpu") == "float16"
    with pytest.raises(ValueError, match=r"'int4' is none of auto, float32, bfloat16, float16"):
        loading.resolve_dtype("int4", config, "cpu")


def test_the_cpu_is_asked_without_failing():
    assert loading.cpu_has_bfloat16() in {True, False}
