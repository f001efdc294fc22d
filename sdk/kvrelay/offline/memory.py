"""How many KV blocks the pool gets, and how long a sequence may be with them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrelay_protocol.errors import NotEnoughMemory, UsageError

if TYPE_CHECKING:
    from kvrelay_engine.models.config import ModelConfig

_CPU_POOL_BYTES = 1 << 30
"""A default that starts fast; `kv_cache_memory_bytes` raises it."""
_GPU_RESERVE_BYTES = 3 << 29
"""For activations and the sampler's tables."""


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Size of the KV pool."""

    num_blocks: int
    max_model_len: int
    """Tokens of prompt and answer together."""


@dataclass(frozen=True, slots=True)
class PoolWish:
    """What the caller said about memory; None where nothing was."""

    block_size: int
    max_num_seqs: int
    max_model_len: int | None
    kv_cache_memory_bytes: int | None
    num_gpu_blocks_override: int | None
    gpu_memory_utilization: float


def plan_pool(
    config: "ModelConfig", wish: PoolWish, *, block_bytes: int, weight_bytes: int, device: str
) -> PoolPlan:
    """Choose the pool's size.

    Raises:
        UsageError: `max_model_len` is beyond what the model can do.
        NotEnoughMemory: the pool does not hold the sequence that was asked for.
    """
    longest = config.max_position_embeddings
    if wish.max_model_len is not None and wish.max_model_len > longest:
        raise UsageError(
            f"max_model_len={wish.max_model_len} exceeds the model's own limit of {longest}; "
            f"lower it to {longest}",
            param="max_model_len",
        )
    num_blocks = wish.num_gpu_blocks_override or _affordable(
        wish, block_bytes=block_bytes, weight_bytes=weight_bytes, device=device
    )
    wanted = wish.max_model_len or longest
    if wish.num_gpu_blocks_override is None:
        # More would never be used.
        num_blocks = min(num_blocks, wish.max_num_seqs * -(-wanted // wish.block_size))
    holds = num_blocks * wish.block_size
    needed = wish.max_model_len or min(longest, 2 * wish.block_size)
    if holds < needed:
        raise NotEnoughMemory(
            f"the KV pool of {num_blocks} blocks holds {holds} tokens, one sequence of {needed} needs "
            f"{-(-needed // wish.block_size) * block_bytes} bytes; raise kv_cache_memory_bytes"
            + (" or lower max_model_len" if wish.max_model_len else ""),
            param="kv_cache_memory_bytes",
        )
    return PoolPlan(num_blocks, min(wanted, holds))


def _affordable(wish: PoolWish, *, block_bytes: int, weight_bytes: int, device: str) -> int:
    if wish.kv_cache_memory_bytes is not None:
        return wish.kv_cache_memory_bytes // block_bytes
    if device == "cpu":
        from kvrelay_infra.host import read_memory

        left = read_memory().available - weight_bytes
        return min(_CPU_POOL_BYTES, max(left // 2, 0)) // block_bytes
    import torch

    free, total = torch.cuda.mem_get_info(torch.device(device))
    others = total - free
    budget = int(total * wish.gpu_memory_utilization) - others - weight_bytes - _GPU_RESERVE_BYTES
    return max(budget, 0) // block_bytes
