"""Random-weight models to measure with: Hugging Face folders, the same bytes on every machine.

Speed does not depend on what the weights say. The standard deviation of 0.02 keeps activations and
logits in the range of a trained model, so that engines can be checked against each other.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrelay_bench.report import cache_dir
from kvrelay_protocol.errors import NotEnoughMemory, UsageError

if TYPE_CHECKING:
    import torch

SEED = 20240229
_STD = 0.02
_SPECIAL = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama with tied embeddings."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int = 8192

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer's matrix products."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def linear_parameters(self) -> int:
        """Weights that every decode step reads: all layers and the output head."""
        return self.num_layers * self.layer_parameters + self.hidden_size * self.vocab_size

    @property
    def parameters(self) -> int:
        """All weights: the head is the embedding, norms are vectors."""
        return self.linear_parameters + (2 * self.num_layers + 1) * self.hidden_size

    @property
    def kv_values_per_token(self) -> int:
        """Numbers the KV cache holds of one token, in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


MODELS = {
    "tiny": ModelShape(64, 2, 4, 2, 16, 128, 512),
    "135m": ModelShape(576, 30, 9, 3, 64, 1536, 49152),
    "0.5b": ModelShape(1280, 24, 20, 4, 64, 3584, 49152),
}


def read_shape(folder: Path) -> ModelShape:
    """Shape of a Llama-like checkpoint, from its config.json.

    Raises:
        InvalidModel, UnsupportedModel: the folder or its configuration is not usable.
    """
    from kvrelay_engine.models.config import parse_model_config
    from kvrelay_protocol.model_files import ModelFiles

    config = parse_model_config(ModelFiles(folder.name, folder).read_config())
    return ModelShape(
        config.hidden_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
    )


def find_model(name: str) -> Path:
    """A folder of that path, or the benchmark model of that size, made when it is missing.

    Raises:
        UsageError: neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if name in MODELS:
        return bench_model(name)
    raise UsageError(
        f"model {name} is neither a folder here nor a benchmark size ({', '.join(MODELS)})"
    )


def bench_model(size: str, *, root: Path | None = None) -> Path:
    """The folder of a random bf16 Llama: config, tokenizer with chat template, safetensors.

    Args:
        size: a name in `MODELS`.
        root: where the folder is kept; None is the benchmarks' cache.

    Returns:
        The folder; it is made at the first call.

    Raises:
        UsageError: no such size, or the disk is full.
        NotEnoughMemory: the weights do not fit into memory while they are written.
    """
    if size not in MODELS:
        raise UsageError(f"model size {size} is unknown; there are {', '.join(MODELS)}")
    shape = MODELS[size]
    recipe = json.dumps([asdict(shape), SEED, _STD, _SPECIAL, _CHAT_TEMPLATE])
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:8]
    folder = (root or cache_dir() / "models") / f"llama-{size}-{digest}"
    if not folder.is_dir():
        _check_space(size, shape, folder.parent)
        _write_whole(shape, folder)
    return folder


def _check_space(size: str, shape: ModelShape, parent: Path) -> None:
    from kvrelay.cli.units import format_size
    from kvrelay_infra.host import read_memory

    needed = 2 * shape.parameters
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UsageError(
            f"model {size} takes {format_size(needed)} and {parent} has {format_size(free)} free; "
            "set XDG_CACHE_HOME to a larger disk"
        )
    available = read_memory().available
    if available < needed:
        raise NotEnoughMemory(
            f"model {size} takes {format_size(needed)} and {format_size(available)} of memory are "
            "available; take a smaller one"
        )


def _write_whole(shape: ModelShape, folder: Path) -> None:
    """Write next to the final place and rename, so that a broken run leaves no half model."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        _write_json(made / "config.json", _config(shape))
        _write_tokenizer(shape.vocab_size, made)
        _write_weights(shape, made / "model.safetensors")
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster
                raise


def _config(shape: ModelShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "initializer_range": _STD,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _write_tokenizer(vocab_size: int, folder: Path) -> None:
    """Bytes, special tokens, and words that text never encodes to but any id decodes to."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġw{index}" for index in range(len(words), vocab_size)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[1],
        "pad_token": _SPECIAL[2],
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", described)


def _write_weights(shape: ModelShape, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(_weights(shape)), path, metadata={"format": "pt"})


def _weights(shape: ModelShape) -> Iterator[tuple[str, "torch.Tensor"]]:
    import torch

    generator = torch.Generator().manual_seed(SEED)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.empty(rows, columns).normal_(0.0, _STD, generator=generator)
        return drawn.to(torch.bfloat16)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    yield "model.embed_tokens.weight", matrix(shape.vocab_size, hidden)
    for index in range(shape.num_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", norm.clone()
        yield f"{layer}.self_attn.q_proj.weight", matrix(queries, hidden)
        yield f"{layer}.self_attn.k_proj.weight", matrix(keys, hidden)
        yield f"{layer}.self_attn.v_proj.weight", matrix(keys, hidden)
        yield f"{layer}.self_attn.o_proj.weight", matrix(hidden, queries)
        yield f"{layer}.post_attention_layernorm.weight", norm.clone()
        yield f"{layer}.mlp.gate_proj.weight", matrix(inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", matrix(inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", matrix(hidden, inner)
    yield "model.norm.weight", norm


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
