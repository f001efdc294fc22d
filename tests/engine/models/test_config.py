"""Parsing of Hugging Face configurations, old and new."""

import json

import pytest
from tiny_models import FAMILIES, tiny_model

from kvrelay_engine.models.config import SUPPORTED_ARCHITECTURES, parse_model_config
from kvrelay_protocol.errors import InvalidModel, UnsupportedModel

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "vocab_size": 320,
}


def parse(architecture="LlamaForCausalLM", **fields):
    return parse_model_config({**BASE, "architectures": [architecture], **fields})


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_transformers_about_every_family(family):
    from transformers import AutoConfig

    path = tiny_model(family)
    theirs = AutoConfig.from_pretrained(path)
    ours = parse_model_config(json.loads((path / "config.json").read_text()))
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_kv_heads == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None)
    assert ours.head_dim == head_dim or (
        head_dim is None and ours.head_dim == theirs.hidden_size // theirs.num_attention_heads
    )
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.sliding_windows == ((32,) * 3 if family == "mistral" else (None,) * 3)
    assert ours.qkv_bias == family.startswith("qwen2")
    assert ours.qk_norm == (family == "qwen3")
    assert ours.checkpoint_dtype == "float32"


def test_defaults_follow_the_family():
    llama = parse(num_key_value_heads=None)
    assert llama.num_kv_heads == 4
    assert llama.head_dim == 16
    assert llama.rms_norm_eps == 1e-6
    assert llama.rope.kind == "default"
    assert llama.rope.theta == 10000.0
    assert not llama.tie_word_embeddings
    assert parse("Qwen3ForCausalLM").head_dim == 128
    assert parse("MistralForCausalLM").sliding_windows == (4096,) * 4
    assert parse("MistralForCausalLM", sliding_window=None).sliding_windows == (None,) * 4


def test_biases_follow_their_flags():
    llama = parse(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = parse("Qwen2ForCausalLM", attention_bias=False)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.mlp_bias) == (True, False, False)
    qwen3 = parse("Qwen3ForCausalLM", attention_bias=True)
    assert (qwen3.qkv_bias, qwen3.output_bias) == (True, True)
    mistral = parse("MistralForCausalLM", attention_bias=True)
    assert (mistral.qkv_bias, mistral.output_bias) == (False, False)


def test_both_spellings_of_rope_mean_the_same():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    old = parse(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    new = parse(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert old.rope == new.rope
    assert old.rope.theta == 5e5
    assert parse(rope_theta=123.0, rope_scaling=None).rope.theta == 123.0


def test_yarn_factor_defaults_to_the_ratio_of_lengths():
    entry = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 256}
    assert parse(rope_parameters=entry).rope.factor == 4.0
    assert parse(rope_parameters={**entry, "attention_factor": 0.5}).rope.attention_factor == 0.5


def test_qwen_windows_need_their_switch():
    def windows(**fields):
        return parse("Qwen2ForCausalLM", sliding_window=32, **fields).sliding_windows

    assert windows() == (None,) * 4
    assert windows(use_sliding_window=True, max_window_layers=2) == (None, None, 32, 32)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(use_sliding_window=True, layer_types=kinds) == (32, None, 32, None)
    assert windows(use_sliding_window=False, layer_types=kinds) == (None,) * 4


def test_end_tokens_may_be_one_or_several():
    assert parse(eos_token_id=7).eos_token_ids == (7,)
    assert parse(eos_token_id=[7, 8, 7]).eos_token_ids == (7, 8)
    assert parse().eos_token_ids == ()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_checkpoint_dtype_has_two_names(key):
    assert parse(**{key: "bfloat16"}).checkpoint_dtype == "bfloat16"


def test_another_architecture_is_named_with_the_supported_ones():
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel") as raised:
        parse("GPT2LMHeadModel")
    for architecture in SUPPORTED_ARCHITECTURES:
        assert architecture in str(raised.value)
    with pytest.raises(UnsupportedModel, match="'bert'"):
        parse_model_config({**BASE, "model_type": "bert"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
    ],
)
def test_unsupported_features_are_named(fields, message):
    with pytest.raises(UnsupportedModel, match=message):
        parse(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_attention_heads": 3}, "3 attention heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": [1]}, "rope parameters"),
        ({"eos_token_id": "end"}, "eos_token_id"),
    ],
)
def test_unusable_values_are_named(fields, message):
    with pytest.raises(InvalidModel, match=message):
        parse(**fields)


@pytest.mark.parametrize("fields", [{"layer_types": ["full_attention"]}, {"sliding_window": -1}])
def test_unusable_windows_are_named(fields):
    with pytest.raises(InvalidModel, match=next(iter(fields))):
        parse("Qwen2ForCausalLM", use_sliding_window=True, max_window_layers=0, **fields)


def test_parsing_does_not_import_torch():
    import subprocess
    import sys

    code = (
        "import sys, kvrelay_engine.models.config, kvrelay_engine.cache.sizing;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
