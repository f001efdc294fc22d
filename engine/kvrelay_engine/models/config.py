"""What a model is: one frozen description parsed from a Hugging Face `config.json`. No torch here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from kvrelay_protocol.errors import InvalidModel, UnsupportedModel

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
_ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of a model; the fields that a kind does not use keep their defaults."""

    kind: RopeKind
    theta: float
    rotary_dim: int
    """How many leading dimensions of a head are rotated."""
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Multiplies cosines and sines (yarn)."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Architecture of one checkpoint, with every default resolved."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    """One a layer: how many tokens a token sees, itself included; None for all."""
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    checkpoint_dtype: str
    """Name of the dtype the weights are stored in, such as `bfloat16`."""


@dataclass(frozen=True, slots=True)
class _Family:
    """How one architecture fills in what its configuration leaves out."""

    qkv_bias: bool = False
    """Has the bias without a flag that says so."""
    bias_flags: bool = False
    """Reads `attention_bias`."""
    qk_norm: bool = False
    default_kv_heads: int | None = None
    default_head_dim: int | None = None


_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(bias_flags=True),
    "MistralForCausalLM": _Family(default_kv_heads=8),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, default_kv_heads=32),
    "Qwen3ForCausalLM": _Family(
        bias_flags=True, qk_norm=True, default_kv_heads=32, default_head_dim=128
    ),
}

SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)


def parse_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration, in its old and its transformers-5 spelling.

    Args:
        raw: the parsed `config.json`.

    Raises:
        UnsupportedModel: another architecture, activation, rope kind or a quantised checkpoint.
        InvalidModel: a required field is missing or is not a usable number.
    """
    architecture, family = _family(raw)
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(
            f"the checkpoint is quantised ({method}); unquantised weights are supported"
        )
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"activation {activation!r} is not supported, only 'silu' is")
    hidden_size = _positive(raw, "hidden_size")
    num_heads = _positive(raw, "num_attention_heads")
    num_kv_heads = _positive(raw, "num_key_value_heads", family.default_kv_heads or num_heads)
    head_dim = _positive(raw, "head_dim", family.default_head_dim or hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise InvalidModel(
            f"config.json: {num_heads} attention heads do not divide into {num_kv_heads} KV heads"
        )
    num_layers = _positive(raw, "num_hidden_layers")
    max_positions = _positive(raw, "max_position_embeddings")
    attention_bias = family.bias_flags and bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and bool(raw.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        sliding_windows=_sliding_windows(architecture, raw, num_layers),
        rope=_rope(raw, head_dim, max_positions),
        eos_token_ids=eos_token_ids(raw.get("eos_token_id")),
        checkpoint_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )


def eos_token_ids(value: object) -> tuple[int, ...]:
    """An `eos_token_id` entry, which may be missing, one id or a list of them."""
    ids = value if isinstance(value, list) else [value]
    if any(token is not None and not isinstance(token, int) for token in ids):
        raise InvalidModel(f"config.json: eos_token_id is {value!r}, expected integers")
    return tuple(dict.fromkeys(token for token in ids if isinstance(token, int)))


def _family(raw: Mapping[str, Any]) -> tuple[str, _Family]:
    named = raw.get("architectures") or []
    for architecture in named:
        if architecture in _FAMILIES:
            return architecture, _FAMILIES[architecture]
    name = ", ".join(map(str, named)) or f"model_type {raw.get('model_type')!r}"
    raise UnsupportedModel(
        f"architecture {name} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _positive(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise InvalidModel(f"config.json lacks {key!r}")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise InvalidModel(f"config.json: {key} is {value!r}, expected a positive integer")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidModel(f"config.json: {key} is {value!r}, expected a number")
    return float(value)


def _sliding_windows(
    architecture: str, raw: Mapping[str, Any], num_layers: int
) -> tuple[int | None, ...]:
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    # An explicit null means no window, an absent key the family's default.
    window = raw.get("sliding_window", 4096)
    if architecture == "MistralForCausalLM":
        return (_window(window),) * num_layers
    if not raw.get("use_sliding_window", False):
        return (None,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", 28)
        return tuple(_window(window) if i >= first else None for i in range(num_layers))
    if len(kinds) != num_layers:
        raise InvalidModel(
            f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers"
        )
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise UnsupportedModel(f"layer types {sorted(unknown)} are not supported")
    return tuple(_window(window) if kind == "sliding_attention" else None for kind in kinds)


def _window(value: object) -> int | None:
    if value is None or (isinstance(value, int) and value > 0):
        return value
    raise InvalidModel(f"config.json: sliding_window is {value!r}, expected a positive integer")


def _rope(raw: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeConfig:
    """`rope_parameters` holds everything since transformers 5; before, theta stood beside it."""
    entry = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(entry, Mapping):
        raise InvalidModel(f"config.json: rope parameters are {entry!r}, expected an object")
    kind = entry.get("rope_type") or entry.get("type") or "default"
    if kind not in _ROPE_KINDS:
        raise UnsupportedModel(
            f"rope type {kind!r} is not supported; supported: {', '.join(_ROPE_KINDS)}"
        )
    theta = _number(entry, "rope_theta", _number(raw, "rope_theta", 10000.0))
    partial = _number(
        entry, "partial_rotary_factor", _number(raw, "partial_rotary_factor", default=1.0)
    )
    # Zero stands for absent: yarn then takes the ratio of the two lengths.
    factor = _number(entry, "factor", default=0.0)
    original = int(
        _number(
            entry,
            "original_max_position_embeddings",
            _number(raw, "original_max_position_embeddings", max_positions),
        )
    )
    if kind in {"linear", "dynamic", "llama3"} and factor <= 0:
        raise InvalidModel(f"config.json: rope type {kind!r} needs a positive factor")
    if kind == "yarn" and factor <= 0:
        factor = max_positions / original
    return RopeConfig(
        kind=cast("RopeKind", kind),
        theta=theta,
        rotary_dim=int(head_dim * partial),
        factor=factor or 1.0,
        original_max_positions=original,
        low_freq_factor=_number(entry, "low_freq_factor", default=1.0),
        high_freq_factor=_number(entry, "high_freq_factor", default=4.0),
        beta_fast=_number(entry, "beta_fast", default=32.0),
        beta_slow=_number(entry, "beta_slow", default=1.0),
        truncate=bool(entry.get("truncate", True)),
        attention_factor=_attention_factor(entry, factor) if kind == "yarn" else 1.0,
    )


def _attention_factor(entry: Mapping[str, Any], factor: float) -> float:
    """Yarn's temperature on the attention scores, folded into cosines and sines."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if entry.get("attention_factor") is not None:
        return _number(entry, "attention_factor", default=1.0)
    if entry.get("mscale") and entry.get("mscale_all_dim"):
        every = _number(entry, "mscale_all_dim", default=1.0)
        return scale(_number(entry, "mscale", default=1.0)) / scale(every)
    return scale(1.0)
