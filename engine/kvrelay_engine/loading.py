"""From a model folder to a runner: configuration, dtype, weights, pool."""

from pathlib import Path

import torch

from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.models.decoder import Decoder
from kvrelay_engine.models.dtypes import resolve_dtype
from kvrelay_engine.models.weights import Progress, load_model_config, load_weights
from kvrelay_engine.runner import ModelRunner
from kvrelay_kernels.cpu.library import cpu_library
from kvrelay_protocol.weights.source import WeightSource


def load_engine(
    model_dir: Path,
    *,
    device: str,
    dtype: str,
    num_blocks: int,
    block_size: int,
    max_step_tokens: int = 0,
    quantization: str | None = None,
    progress: Progress | None = None,
    source: WeightSource | None = None,
) -> ModelRunner:
    """Load a checkpoint and allocate its pool.

    Args:
        model_dir: a Hugging Face folder with safetensors.
        device: a torch device name.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` (see `resolve_dtype`).
        num_blocks: blocks in the pool.
        block_size: tokens a block.
        max_step_tokens: tokens of the largest step, for which activations are allocated at once.
        quantization: None, or `int8` for projections of 8-bit weights with a scale for each output.
        progress: told about the checkpoint's bytes while they load.
        source: where the weights come from; None: the folder.

    Raises:
        InvalidModel: the folder does not hold a complete checkpoint.
        UnsupportedModel: another architecture, rope kind or a quantised checkpoint.
        ValueError: `dtype` is none of the names.
    """
    config = load_model_config(model_dir)
    target = torch.device(device)
    chosen = getattr(torch, resolve_dtype(dtype, config.checkpoint_dtype))
    if quantization not in {None, "int8"}:
        raise ValueError(f"quantization {quantization!r} is none of int8, None")
    weights = load_weights(
        model_dir,
        config,
        device=target,
        dtype=chosen,
        quantization=quantization,
        progress=progress,
        source=source,
    )
    pool = KVPool(config, num_blocks=num_blocks, block_size=block_size, device=target, dtype=chosen)
    return ModelRunner(config, Decoder(config, weights), pool, max_step_tokens=max_step_tokens)


_TORCH_THREADS = torch.get_num_threads()
"""What torch chose for this machine, before any engine changed it."""


def set_compute_threads(threads: int) -> None:
    """How many threads a step uses; 0 takes as many as torch would.

    Torch gets one where the compiled kernels have their own: its threads would spin for the same cores
    after each of its own few ops.
    """
    threads = threads or _TORCH_THREADS
    library = cpu_library()
    if library is None:
        torch.set_num_threads(threads)
        return
    library.set_threads(threads)
    torch.set_num_threads(1)
