"""From a folder to a runner, and the choice of dtype."""

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
    assert runner.pool.dtype == torch.bfloat16
    assert runner.pool.tensor.shape == (3, 2, 5, 8, 2, 32)
    assert runner.config == load_model_config(tiny_model("qwen3"))
    assert calls
