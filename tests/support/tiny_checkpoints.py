"""Random float32 checkpoints of several families, written without transformers: for tests of bytes, not answers."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kvrelay_engine.models.config import parse_model_config
from kvrelay_engine.models.weights import Part, layer_plan, outer_parts
from kvrelay_protocol.model_files import DEMO_MODEL_DIR

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 640,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SHARDED = {"qwen3"}
"""In two files with an index."""


@functools.cache
def tiny_checkpoint(family: str) -> Path:
    """A folder, made once a test process: config, weights, and the demo model's tokenizer."""
    folder = Path(tempfile.mkdtemp(prefix=f"kvrelay-tiny-{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fields = _SHAPE | _FAMILIES[family]
    fields["architectures"] = [_ARCHITECTURES[fields["model_type"]]]
    (folder / "config.json").write_text(json.dumps(fields))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL_DIR / name, folder / name)
    config = parse_model_config(fields)
    within = [part for n in range(config.num_layers) for part in layer_plan(config, n).parts()]
    parts = dict.fromkeys((*within, *outer_parts(config)))
    _write(folder, [*parts], family in _SHARDED)
    return folder


def _write(folder: Path, parts: list[Part], sharded: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    tensors = {part.name: torch.randn(part.shape, generator=generator) * 0.2 for part in parts}
    names = sorted(tensors)
    if not sharded:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, held in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in held}, folder / file)
        index |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
