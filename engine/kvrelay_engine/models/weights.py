"""Reading a checkpoint folder: configuration, then safetensors in layer order straight to the device."""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from kvrelay_engine.models.config import ModelConfig, eos_token_ids, parse_model_config
from kvrelay_engine.models.decoder import DecoderWeights, LayerWeights
from kvrelay_kernels.linear import LinearWeights, activation_dtype, pack_linear
from kvrelay_protocol.errors import InvalidModel

Progress = Callable[[int, int], None]
"""Called as `(bytes_done, bytes_total)` of the checkpoint while it loads."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


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
) -> DecoderWeights:
    """Load, fuse and pack the weights.

    Every name and shape is checked against the headers before the first byte is read. The files are
    mapped: each tensor goes from the page cache to its packed place in one pass.

    Args:
        model_dir: a folder with safetensors.
        config: its configuration.
        device: where the model will run.
        dtype: what the weights are stored in.
        quantization: None, or `int8` for the projections.
        progress: told about the checkpoint's bytes.

    Raises:
        InvalidModel: no safetensors, a missing tensor, a wrong shape, an unreadable file.
    """
    try:
        with _Checkpoint(model_dir, device, dtype, quantization, progress) as checkpoint:
            return _assemble(checkpoint, config)
    except (SafetensorError, OSError) as error:
        raise InvalidModel(f"cannot read the weights in {model_dir}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Part:
    """One checkpoint tensor that fills some rows of a fused one."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _LayerPlan:
    """The parts of every tensor of one layer; an empty tuple where the model has no such tensor."""

    input_norm: tuple[_Part, ...]
    qkv: tuple[_Part, ...]
    qkv_bias: tuple[_Part, ...]
    query_norm: tuple[_Part, ...]
    key_norm: tuple[_Part, ...]
    output: tuple[_Part, ...]
    output_bias: tuple[_Part, ...]
    post_attention_norm: tuple[_Part, ...]
    gate_up: tuple[_Part, ...]
    gate_up_bias: tuple[_Part, ...]
    down: tuple[_Part, ...]
    down_bias: tuple[_Part, ...]

    def parts(self) -> tuple[_Part, ...]:
        names = self.__dataclass_fields__
        return tuple(part for name in names for part in getattr(self, name))


def _layer_plan(config: ModelConfig, index: int) -> _LayerPlan:
    hidden, inner = config.hidden_size, config.intermediate_size
    query_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    prefix = f"model.layers.{index}"
    attention = {"q_proj": query_rows, "k_proj": kv_rows, "v_proj": kv_rows}
    gates = {"gate_proj": inner, "up_proj": inner}

    def weights(block: str, rows: Mapping[str, int], width: int) -> tuple[_Part, ...]:
        return tuple(_Part(f"{prefix}.{block}.{n}.weight", (r, width)) for n, r in rows.items())

    def biases(block: str, rows: Mapping[str, int], present: bool) -> tuple[_Part, ...]:
        return tuple(_Part(f"{prefix}.{block}.{n}.bias", (r,)) for n, r in rows.items() if present)

    def norm(name: str, size: int, present: bool = True) -> tuple[_Part, ...]:
        return (_Part(f"{prefix}.{name}.weight", (size,)),) if present else ()

    return _LayerPlan(
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


def _assemble(checkpoint: "_Checkpoint", config: ModelConfig) -> DecoderWeights:
    table = (config.vocab_size, config.hidden_size)
    embedding = _Part("model.embed_tokens.weight", table)
    final_norm = _Part("model.norm.weight", (config.hidden_size,))
    head = embedding if config.tie_word_embeddings else _Part("lm_head.weight", table)
    plans = [_layer_plan(config, index) for index in range(config.num_layers)]
    within = (part for plan in plans for part in plan.parts())
    # A tied head is the embedding again: once is enough. The order makes errors repeatable.
    checkpoint.expect(tuple(dict.fromkeys((embedding, *within, final_norm, head))))

    table_weights = checkpoint.take_embedding(embedding)
    layers = tuple(_load_layer(checkpoint, plan) for plan in plans)
    norm = checkpoint.take(final_norm)
    last = checkpoint.take_linear((head,), (), counted=not config.tie_word_embeddings)
    return DecoderWeights(embedding=table_weights, layers=layers, final_norm=norm, head=last)


def _load_layer(checkpoint: "_Checkpoint", plan: _LayerPlan) -> LayerWeights:
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
    """Open safetensors files of one folder; closes them on exit."""

    def __init__(
        self,
        model_dir: Path,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None,
        progress: Progress | None,
    ) -> None:
        self._model_dir = model_dir
        self._device = device
        self._dtype = dtype
        self._linear_dtype = torch.int8 if quantization == "int8" else dtype
        self._activation_dtype = activation_dtype(device, dtype)
        self._progress = progress
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._file_of = _tensor_files(model_dir)
        self._bytes_done = 0
        self._bytes_total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def expect(self, parts: tuple[_Part, ...]) -> None:
        """Check names and shapes of all tensors to come, and learn how many bytes they are."""
        missing = [part.name for part in parts if part.name not in self._file_of]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InvalidModel(f"the weights in {self._model_dir} lack {missing[0]}{more}")
        for part in parts:
            stored = self._slice(part.name)
            shape = tuple(stored.get_shape())
            if shape != part.shape:
                raise InvalidModel(
                    f"{part.name} in {self._model_dir} has shape {list(shape)}, "
                    f"config.json implies {list(part.shape)}"
                )
            self._bytes_total += math.prod(shape) * _stored_bytes(part.name, stored.get_dtype())

    def take(self, *parts: _Part) -> torch.Tensor:
        """Norm or bias: stacked on the device, in the dtype of the activations."""
        stored = [self._read(part) for part in parts]
        return torch.cat([part.to(self._device, self._activation_dtype) for part in stored])

    def take_embedding(self, part: _Part) -> torch.Tensor:
        """On a CPU the mapped file itself, if it needs no rounding: only the rows of a step are read."""
        stored = self._read(part)
        if self._device.type == "cpu" and stored.dtype.itemsize <= self._dtype.itemsize:
            return stored
        return stored.to(self._device, self._dtype)

    def take_linear(
        self, parts: tuple[_Part, ...], bias: tuple[_Part, ...], *, counted: bool = True
    ) -> LinearWeights:
        """One projection, its parts stacked along the outputs."""
        return pack_linear(
            [self._read(part, counted=counted) for part in parts],
            device=self._device,
            dtype=self._linear_dtype,
            bias=self.take(*bias) if bias else None,
        )

    def _read(self, part: _Part, *, counted: bool = True) -> torch.Tensor:
        """A view of the mapped file."""
        stored: torch.Tensor = self._open(self._file_of[part.name]).get_tensor(part.name)
        self._bytes_done += stored.nbytes if counted else 0
        if self._progress is not None and counted:
            self._progress(self._bytes_done, self._bytes_total)
        return stored

    def _slice(self, name: str) -> Any:
        try:
            return self._open(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise InvalidModel(
                f"{self._file_of[name]} in {self._model_dir} lacks {name}: {error}"
            ) from error

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._model_dir / file
            if not path.is_file():
                raise InvalidModel(f"{self._model_dir} lacks the weight file {file}")
            handle = safe_open(path, framework="pt", device="cpu")
            self._files[file] = self._stack.enter_context(handle)
        return self._files[file]


def _tensor_files(model_dir: Path) -> Mapping[str, str]:
    """File name of each tensor of the checkpoint."""
    if (model_dir / _INDEX).is_file():
        files = _read_json(model_dir / _INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in files.values()
        ):
            raise InvalidModel(f"{model_dir / _INDEX} has no usable weight_map")
        return files
    if not (model_dir / _SINGLE).is_file():
        raise InvalidModel(f"{model_dir} has neither {_SINGLE} nor {_INDEX}")
    with safe_open(model_dir / _SINGLE, framework="pt", device="cpu") as handle:
        return dict.fromkeys(handle.keys(), _SINGLE)


_STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def _stored_bytes(name: str, dtype: str) -> int:
    if dtype not in _STORED_BYTES:
        raise InvalidModel(f"{name} is stored as {dtype}; supported: {', '.join(_STORED_BYTES)}")
    return _STORED_BYTES[dtype]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModel(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path} does not hold a JSON object")
    return value
