"""Rotary frequencies of every kind against transformers."""

import pytest
import torch

from kvrelay_engine.models.config import parse_model_config
from kvrelay_engine.models.rope import inverse_frequencies, rotary_angles

KINDS = {
    "default": {"rope_theta": 10000.0},
    "linear": {"rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn with every option": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_matches_transformers(name, head_dim):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaConfig(
        hidden_size=4 * head_dim,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": name, **KINDS[name]},
        architectures=["LlamaForCausalLM"],
    )
    rope = parse_model_config(theirs.to_dict()).rope
    positions = torch.tensor([0, 1, 17, 600, 4095])
    cos, sin = rotary_angles(positions, inverse_frequencies(rope), rope.attention_factor)
    expected_cos, expected_sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions[None])
    # Half an angle step at position 4095 is far larger; this allows rounding of the frequency only.
    torch.testing.assert_close(cos, expected_cos[0, :, : head_dim // 2], atol=1e-3, rtol=0)
    torch.testing.assert_close(sin, expected_sin[0, :, : head_dim // 2], atol=1e-3, rtol=0)
    torch.testing.assert_close(
        inverse_frequencies(rope), LlamaRotaryEmbedding(theirs).inv_freq, rtol=1e-6, atol=0
    )
