"""A Llama checkpoint of bf16 safetensors as GGUF, bf16 or Q8_0. Runs in llama.cpp's environment.

    python -P write_gguf.py MODEL_FOLDER bf16|q8_0 OUT

The vocabulary is left out: benchmarks feed token ids. llama.cpp rotates neighbouring dimensions where
Hugging Face rotates halves, so the rows of the query and key projections are permuted.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def main() -> int:
    folder, kind, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    config = json.loads((folder / "config.json").read_text())
    if config.get("architectures") != ["LlamaForCausalLM"]:
        raise SystemExit(f"only LlamaForCausalLM is converted, this is {config['architectures']}")
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _describe(writer, config, kind)
    for path in sorted(folder.glob("*.safetensors")):
        for name, values in _read_safetensors(path):
            _add(writer, config, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)
    return 0


def _describe(writer: Any, config: dict[str, Any], kind: str) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "q8_0" else gguf.LlamaFileType.MOSTLY_BF16
    )
    writer.add_tokenizer_model("none")


def _add(writer: Any, config: dict[str, Any], name: str, values: Any, kind: str) -> None:
    target = f"{_gguf_name(name)}.weight"
    if values.ndim == 1:
        writer.add_tensor(target, _to_float32(values))
        return
    heads = config["num_attention_heads"]
    if name.endswith("q_proj.weight"):
        values = _interleave(values, heads)
    elif name.endswith("k_proj.weight"):
        values = _interleave(values, config.get("num_key_value_heads") or heads)
    if kind == "q8_0":
        types = gguf.GGMLQuantizationType
        packed = gguf.quants.quantize(_to_float32(values), types.Q8_0)
        writer.add_tensor(target, packed, raw_dtype=types.Q8_0)
    else:
        raw = np.ascontiguousarray(values).view(np.uint8)
        writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return _OTHER_NAMES[stem]
    _, _, index, rest = stem.split(".", 3)
    return f"blk.{index}.{_LAYER_NAMES[rest]}"


def _interleave(values: Any, heads: int) -> Any:
    """[heads, 2 halves, dim / 2, in] to [heads, dim / 2, 2, in]."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _to_float32(values: Any) -> Any:
    """A bf16 number is the upper half of a float32."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def _read_safetensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and bf16 bits as uint16; NumPy has no bf16."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{name} is {entry['dtype']}; only bf16 checkpoints are converted")
        begin, end = entry["data_offsets"]
        yield name, data[begin:end].view(np.uint16).reshape(entry["shape"])


if __name__ == "__main__":
    sys.exit(main())
