"""Logits of the fused decoder against transformers, for families and the options they may carry."""

import pytest
import torch
from tiny_models import FAMILIES, build_tiny_model, random_prompt, reference_logits, tiny_model

from kvrelay_engine.loading import load_engine
from kvrelay_engine.models.decoder import PackedTokens
from kvrelay_engine.models.forward import ForwardPass
from kvrelay_kernels.paged_attention import attention_layout


def all_logits(path, tokens, dtype="float32"):
    """Logits of every position from one packed prompt."""
    runner = load_engine(path, device="cpu", dtype=dtype, num_blocks=64, block_size=16)
    count = len(tokens)
    table = torch.randperm(64)[: -(-count // 16)]
    positions = torch.arange(count)
    layers = []
    packed = PackedTokens(
        ids=torch.tensor(tokens),
        positions=positions,
        slots=table[positions // 16] * 16 + positions % 16,
        layout=attention_layout(table.int().unsqueeze(0), [count], [count]),
    )
    with torch.inference_mode():
        forward = ForwardPass(runner.decoder, runner.pool.tensor, capacity=count)
        logits = forward.run(packed, torch.arange(count), layers.append)
        assert layers == list(range(runner.config.num_layers))
        return logits


def assert_logits_match(path, length=150):
    tokens = random_prompt(length)
    torch.testing.assert_close(
        all_logits(path, tokens), reference_logits(path, tokens), atol=2e-3, rtol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(family):
    assert_logits_match(tiny_model(family))


OPTIONS = {
    "every bias": ("llama2", {"attention_bias": True, "mlp_bias": True}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "some layers windowed": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "named layer types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 17,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "no window": ("mistral", {"sliding_window": None}),
    "wide heads": ("mistral", {"head_dim": 40}),
    "one kv head": ("llama3", {"num_key_value_heads": 1}),
    "linear rope": (
        "llama2",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "dynamic rope": (
        "llama2",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "yarn rope": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
}


@pytest.mark.parametrize(("family", "fields"), OPTIONS.values(), ids=OPTIONS.keys())
def test_logits_match_with_options(family, fields, tmp_path):
    assert_logits_match(build_tiny_model(family, tmp_path, **fields))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(dtype, tmp_path):
    # At the usual scale of weights: the wide ones of the other tests amplify every rounding.
    path = build_tiny_model("qwen3", tmp_path, initializer_range=0.05)
    tokens = random_prompt(60)
    wide, narrow = all_logits(path, tokens), all_logits(path, tokens, dtype)
    error = (narrow.float() - wide).norm() / wide.norm()
    assert error < 0.03
