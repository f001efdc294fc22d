"""From the arguments of `LLM` to a loaded model with its pool, warmed up."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrelay.offline.memory import PoolWish, plan_pool
from kvrelay_protocol.errors import DeviceUnavailable, NotEnoughMemory, UsageError
from kvrelay_protocol.model_files import ModelFiles
from kvrelay_protocol.weights.source import WeightSource

if TYPE_CHECKING:
    from kvrelay_engine.runner import ModelRunner

log = logging.getLogger(__name__)

_DTYPES = {"half": "float16", "float": "float32"}
"""vLLM's further names."""
_QUANTIZATIONS = (None, "int8")


@dataclass(frozen=True, slots=True)
class LoadWish:
    """What the caller said about the model's form."""

    device: str
    dtype: str
    quantization: str | None
    threads: int
    max_batch_tokens: int | None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready for its first prompt."""

    runner: "ModelRunner"
    max_model_len: int
    max_batch_tokens: int


def load(files: ModelFiles, wish: LoadWish, pool: PoolWish) -> Loaded:
    """Load weights, allocate the pool, run one step.

    Raises:
        InvalidModel, UnsupportedModel: see `load_engine`.
        UsageError: an argument is out of range.
        DeviceUnavailable: no such device here.
        NotEnoughMemory: the pool is too small, or does not fit beside the weights.
    """
    if wish.quantization not in _QUANTIZATIONS:
        raise UsageError(
            f"quantization={wish.quantization!r} is not supported; use 'int8' or None",
            param="quantization",
        )
    files.read_config()
    # What is not on this machine arrives while torch is imported.
    weights = files.open_weights()
    try:
        loaded = _load(files, weights, wish, pool)
        for line in weights.report().lines():
            log.info("weights: %s", line)
        return loaded
    finally:
        weights.close()


def _load(files: ModelFiles, weights: WeightSource, wish: LoadWish, pool: PoolWish) -> Loaded:
    import torch

    from kvrelay_engine.cache.sizing import kv_bytes_per_block
    from kvrelay_engine.loading import load_engine, set_compute_threads
    from kvrelay_engine.models.dtypes import DTYPE_BYTES
    from kvrelay_engine.models.weights import load_model_config
    from kvrelay_engine.runtime.warmup import warm_up

    device = _device(wish.device)
    set_compute_threads(wish.threads)
    config = load_model_config(files.directory)
    dtype = _dtype(wish.dtype, config.checkpoint_dtype)
    plan = plan_pool(
        config,
        pool,
        block_bytes=kv_bytes_per_block(config, pool.block_size, DTYPE_BYTES[dtype]),
        weight_bytes=files.weight_bytes(),
        device=device,
    )
    # A GPU needs more rows than a CPU to be busy.
    tokens = wish.max_batch_tokens or (2048 if device == "cpu" else 8192)
    try:
        runner = load_engine(
            files.directory,
            device=device,
            dtype=dtype,
            num_blocks=plan.num_blocks,
            block_size=pool.block_size,
            max_step_tokens=tokens + pool.max_num_seqs,
            quantization=wish.quantization,
            source=weights,
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise NotEnoughMemory(
            f"weights and a KV pool of {plan.num_blocks} blocks do not fit on {device}; lower "
            f"kv_cache_memory_bytes ({type(error).__name__})",
            param="kv_cache_memory_bytes",
        ) from None
    warm_up(runner)
    return Loaded(runner, plan.max_model_len, tokens)


def _device(device: str) -> str:
    import torch

    kind, _, index = device.partition(":")
    if kind not in {"auto", "cpu", "cuda"} or (index and not index.isdigit()):
        raise UsageError(
            f"device={device!r}; it must be 'auto', 'cpu', 'cuda' or 'cuda:N'", param="device"
        )
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto":
        return "cuda" if here else "cpu"
    if kind == "cuda" and int(index or 0) >= here:
        raise DeviceUnavailable(
            f"device={device!r}: torch {torch.__version__} sees {here} CUDA devices; use device='cpu'",
            param="device",
        )
    return device


def _dtype(dtype: str, stored: str) -> str:
    from kvrelay_engine.models.dtypes import resolve_dtype

    try:
        return resolve_dtype(_DTYPES.get(dtype, dtype), stored)
    except ValueError as error:
        raise UsageError(str(error), param="dtype") from None
