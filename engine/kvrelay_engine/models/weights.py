"""From a checkpoint to a decoder's weights: configuration, then tensors in layer order to the device."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvrelay_engine.models.config import ModelConfig, eos_token_ids, parse_model_config
from kvrelay_engine.models.decoder import DecoderWeights, LayerWeights
from kvrelay_kernels.linear import LinearWeights, activation_dtype, pack_linear
from kvrelay_protocol.errors import InvalidModel
from kvrelay_protocol.weights.header import ITEM_BYTES, StoredTensor
from kvrelay_protocol.weights.local import LocalWeights
from kvrelay_protocol.weights.source import WeightSource

Progress = Callable[[int, int], None]
"""Called as `(bytes_done, bytes_total)` of the checkpoint while it loads."""

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def load_model_config(model_dir: Path) -> ModelConfig:
    """Read `config.json`, and the further end tokens that `generation_config.json` names.

    Raises:
        InvalidModel: not a model folder, or its configuration cannot be read.
        UnsupportedModel: see `parse_model_config`.
    """
    if not model_dir.is_dir():
        raise InvalidModel(f"{model_dir} is not a folder")
    if not (model_dir / "config.json").is_file():
        raise InvalidModel(f"{model_dir} is not a model folder: it has no config.json")
    config = parse_model_config(_read_json(model_dir / "config.json"))
    generation = model_dir / "generation_config.json"
    if not generation.is_file():
        return config
    # Chat models often end a turn with a token that only the generation settings name.
    further = eos_token_ids(_read_json(generation).get("eos_token_id"))
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *further))))


def load_weights(
    model_dir: Path,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None = None,
    progress: Progress | None = None,
    source: WeightSource | None = None,
) -> DecoderWeights:
    """Load, fuse and pack the weights.

    Every name and shape is checked against the headers before the first byte is read. Each tensor goes
    from the source's buffer (of local files, the page cache) to its packed place in one pass; of
    weights that are still arriving, earlier layers are packed while later ones are on their way.

    Args:
        model_dir: a folder with safetensors.
        config: its configuration.
        device: where the model will run.
        dtype: what the weights are stored in.
        quantization: None, or `int8` for the projections.
        progress: told about the checkpoint's bytes.
        source: where the weights come from; None: the folder's files.

    Raises:
        InvalidModel: no safetensors, a missing tensor, a wrong shape, an unreadable file, a wrong
            checksum.
    """
    source = source or LocalWeights(model_dir)
    return _assemble(_Checkpoint(source, device, dtype, quantization, progress), config)


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor that fills some rows of a fused one."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The parts of every tensor of one layer; an empty tuple where the model has no such tensor."""

    input_norm: tuple[Part, ...]
    qkv: tuple[Part, ...]
    qkv_bias: tuple[Part, ...]
    query_norm: tuple[Part, ...]
    key_norm: tuple[Part, ...]
    output: tuple[Part, ...]
    output_bias: tuple[Part, ...]
    post_attention_norm: tuple[Part, ...]
    gate_up: tuple[Part, ...]
    gate_up_bias: tuple[Part, ...]
    down: tuple[Part, ...]
    down_bias: tuple[Part, ...]

    def parts(self) -> tuple[Part, ...]:
        names = self.__dataclass_fields__
        return tuple(part for name in names for part in getattr(self, name))


def layer_plan(config: ModelConfig, index: int) -> LayerPlan:
    """Which tensors layer `index` is made of, in the order in which they are stacked."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    prefix = f"model.layers.{index}"
    attention = {"q_proj": query_rows, "k_proj": kv_rows, "v_proj": kv_rows}
    gates = {"gate_proj": inner, "up_proj": inner}

    def weights(block: str, rows: Mapping[str, int], width: int) -> tuple[Part, ...]:
        return tuple(Part(f"{prefix}.{block}.{n}.weight", (r, width)) for n, r in rows.items())

    def biases(block: str, rows: Mapping[str, int], present: bool) -> tuple[Part, ...]:
        return tuple(Part(f"{prefix}.{block}.{n}.bias", (r,)) for n, r in rows.items() if present)

    def norm(name: str, size: int, present: bool = True) -> tuple[Part, ...]:
        return (Part(f"{prefix}.{name}.weight", (size,)),) if present else ()

    return LayerPlan(
        input_norm=norm("input_layernorm", hidden),
        qkv=weights("self_attn", attention, hidden),
        qkv_bias=biases("self_attn", attention, config.qkv_bias),
        query_norm=norm("self_attn.q_norm", config.head_dim, config.qk_norm),
        key_norm=norm("self_attn.k_norm", config.head_dim, config.qk_norm),
        output=weights("self_attn", {"o_proj": hidden}, query_rows),
        output_bias=biases("self_attn", {"o_proj": hidden}, config.output_bias),
        post_attention_norm=norm("post_attention_layernorm", hidden),
        gate_up=weights("mlp", gates, hidden),
        gate_up_bias=biases("mlp", gates, config.mlp_bias),
        down=weights("mlp", {"down_proj": hidden}, inner),
        down_bias=biases("mlp", {"down_proj": hidden}, config.mlp_bias),
    )


def outer_parts(config: ModelConfig) -> tuple[Part, Part, Part]:
    """Embedding, last norm and head; a tied head is the embedding again."""
    table = (config.vocab_size, config.hidden_size)
    embedding = Part("model.embed_tokens.weight", table)
    final_norm = Part("model.norm.weight", (config.hidden_size,))
    return (
        embedding,
        final_norm,
        (embedding if config.tie_word_embeddings else Part("lm_head.weight", table)),
    )


def _assemble(checkpoint: "_Checkpoint", config: ModelConfig) -> DecoderWeights:
    embedding, final_norm, head = outer_parts(config)
    plans = [layer_plan(config, index) for index in range(config.num_layers)]
    within = (part for plan in plans for part in plan.parts())
    # A tied head is the embedding again: once is enough. The order makes errors repeatable.
    checkpoint.expect(tuple(dict.fromkeys((embedding, *within, final_norm, head))))

    stored = checkpoint.read(embedding)
    table_weights = checkpoint.place_embedding(stored)
    tied = checkpoint.pack((stored,)) if config.tie_word_embeddings else None
    del stored
    layers = tuple(_load_layer(checkpoint, plan) for plan in plans)
    norm = checkpoint.take(final_norm)
    last = checkpoint.take_linear((head,), ()) if tied is None else tied
    return DecoderWeights(embedding=table_weights, layers=layers, final_norm=norm, head=last)


def _load_layer(checkpoint: "_Checkpoint", plan: LayerPlan) -> LayerWeights:
    take, linear = checkpoint.take, checkpoint.take_linear
    return LayerWeights(
        input_norm=take(*plan.input_norm),
        qkv=linear(plan.qkv, plan.qkv_bias),
        query_norm=take(*plan.query_norm) if plan.query_norm else None,
        key_norm=take(*plan.key_norm) if plan.key_norm else None,
        output=linear(plan.output, plan.output_bias),
        post_attention_norm=take(*plan.post_attention_norm),
        gate_up=linear(plan.gate_up, plan.gate_up_bias),
        down=linear(plan.down, plan.down_bias),
    )


class _Checkpoint:
    """Tensors of one source, as the device wants them."""

    def __init__(
        self,
        source: WeightSource,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None,
        progress: Progress | None,
    ) -> None:
        self._source = source
        self._device = device
        self._dtype = dtype
        self._linear_dtype = torch.int8 if quantization == "int8" else dtype
        self._activation_dtype = activation_dtype(device, dtype)
        self._progress = progress
        self._bytes_done = 0
        self._bytes_total = 0

    def expect(self, parts: tuple[Part, ...]) -> None:
        """Check names and shapes of all tensors to come, and learn how many bytes they are."""
        tensors, origin = self._source.tensors, self._source.origin
        missing = [part.name for part in parts if part.name not in tensors]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InvalidModel(f"the weights in {origin} lack {missing[0]}{more}")
        for part in parts:
            stored = tensors[part.name]
            if stored.shape != part.shape:
                raise InvalidModel(
                    f"{part.name} in {origin} has shape {list(stored.shape)}, "
                    f"config.json implies {list(part.shape)}"
                )
            if stored.dtype not in ITEM_BYTES:
                raise InvalidModel(
                    f"{part.name} is stored as {stored.dtype}; supported: {', '.join(ITEM_BYTES)}"
                )
            self._bytes_total += stored.nbytes
        self._source.need([part.name for part in parts])

    def take(self, *parts: Part) -> torch.Tensor:
        """Norm or bias: stacked on the device, in the dtype of the activations."""
        stored = [self.read(part) for part in parts]
        return torch.cat([part.to(self._device, self._activation_dtype) for part in stored])

    def place_embedding(self, stored: torch.Tensor) -> torch.Tensor:
        """On a CPU the source's own buffer, if it needs no rounding: of a mapped file, only the rows
        of a step are read.
        """
        if self._device.type == "cpu" and stored.dtype.itemsize <= self._dtype.itemsize:
            return stored
        return stored.to(self._device, self._dtype)

    def take_linear(self, parts: tuple[Part, ...], bias: tuple[Part, ...]) -> LinearWeights:
        """One projection, its parts stacked along the outputs."""
        stored = [self.read(part) for part in parts]
        return self.pack(stored, self.take(*bias) if bias else None)

    def pack(
        self, stored: Sequence[torch.Tensor], bias: torch.Tensor | None = None
    ) -> LinearWeights:
        return pack_linear(stored, device=self._device, dtype=self._linear_dtype, bias=bias)

    def read(self, part: Part) -> torch.Tensor:
        """A view of the source's buffer, once the tensor is there."""
        stored = as_tensor(self._source.read(part.name), self._source.tensors[part.name])
        self._bytes_done += stored.nbytes
        if self._progress is not None:
            self._progress(self._bytes_done, self._bytes_total)
        return stored


def as_tensor(content: memoryview, stored: StoredTensor) -> torch.Tensor:
    """A tensor over a buffer that starts where the tensor does.

    Args:
        content: writable; aligned as the tensor is in its file.
        stored: of one of the dtypes that models are loaded from.
    """
    dtype = STORED_DTYPES[stored.dtype]
    # Files whose header is not padded are rare; vector loads need what they lack.
    buffer = bytearray(content) if stored.start % dtype.itemsize else content
    return torch.frombuffer(buffer, dtype=dtype).view(stored.shape)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModel(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path} does not hold a JSON object")
    return value
