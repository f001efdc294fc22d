"""From a model folder to a runner: configuration, dtype, weights, pool."""

import platform
from pathlib import Path

import torch

from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.models.config import ModelConfig
from kvrelay_engine.models.decoder import Decoder
from kvrelay_engine.models.weights import Progress, load_model_config, load_weights
from kvrelay_engine.runner import ModelRunner

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_engine(
    model_dir: Path,
    *,
    device: str,
    dtype: str,
    num_blocks: int,
    block_size: int,
    progress: Progress | None = None,
) -> ModelRunner:
    """Load a checkpoint and allocate its pool.

    Args:
        model_dir: a Hugging Face folder with safetensors.
        device: a torch device name.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` (see `resolve_dtype`).
        num_blocks: blocks in the pool.
        block_size: tokens a block.
        progress: told about the checkpoint's bytes while they load.

    Raises:
        InvalidModel: the folder does not hold a complete checkpoint.
        UnsupportedModel: another architecture, rope kind or a quantised checkpoint.
        ValueError: `dtype` is none of the names.
    """
    config = load_model_config(model_dir)
    target = torch.device(device)
    chosen = _DTYPES[resolve_dtype(dtype, config, device)]
    weights = load_weights(model_dir, config, device=target, dtype=chosen, progress=progress)
    pool = KVPool(config, num_blocks=num_blocks, block_size=block_size, device=target, dtype=chosen)
    return ModelRunner(config, Decoder(config, weights), pool, target, chosen)


def resolve_dtype(dtype: str, config: ModelConfig, device: str) -> str:
    """Name of the dtype to compute in.

    `auto` is the checkpoint's own on an accelerator. On a CPU it is bfloat16 where the checkpoint is
    and the CPU multiplies it natively, otherwise float32: emulated 16-bit arithmetic is slower.

    Raises:
        ValueError: `dtype` is none of the names.
    """
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r} is none of auto, {', '.join(_DTYPES)}")
        return dtype
    stored = config.checkpoint_dtype if config.checkpoint_dtype in _DTYPES else "float32"
    if torch.device(device).type != "cpu":
        return stored
    return stored if stored == "bfloat16" and cpu_has_bfloat16() else "float32"


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16, AMX or Arm BF16)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.system() == "Darwin" and platform.machine() == "arm64"
    names = {"avx512_bf16", "amx_bf16", "bf16"}
    return any(
        names & set(line.partition(":")[2].split())
        for line in text.splitlines()
        if line.startswith(("flags", "Features"))
    )
