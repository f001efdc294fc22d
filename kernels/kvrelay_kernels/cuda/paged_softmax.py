"""What the attention kernels share: their settings, and a streamed softmax in base 2.

A row keeps a maximum m, a sum l and an accumulator, and folds in the scores s of one tile of keys:

    m' = max(m, max s)   l' = l * 2**(m - m') + sum 2**(s - m')   acc' = acc * 2**(m - m') + 2**(s - m') @ V

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kvrelay_kernels.cuda.device import device_traits

_LOG2_E = math.log2(math.e)
_COMPUTE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    # Every e4m3 number is a float16 number, and one instruction converts two of them.
    torch.float8_e4m3fn: tl.float16,
}


@dataclass(frozen=True, slots=True)
class AttentionTraits:
    """What the kernels are compiled for and the numbers they multiply by."""

    factor: float
    """Of the products of queries and keys, before the exponent or the tanh; see `base2_scores`."""
    cap: float
    value_scale: float
    sliding_window: int | None
    constants: dict[str, Any]
    """Constants of every kernel: `GROUP`, `HEAD_DIM`, `BLOCK_DIM`, `PAGE`, `SOFT_CAP`, ..."""

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
        value_scale: float,
    ) -> "AttentionTraits":
        """Settings for these tensors.

        Raises:
            ValueError: a dtype, a stride or a scale that the kernels do not take.
        """
        dtype = key_cache.dtype
        if dtype not in _COMPUTE:
            names = ", ".join(str(known) for known in _COMPUTE)
            raise ValueError(f"key_cache has dtype {dtype}, expected {names}")
        capability = device_traits(query.device).capability
        if dtype == torch.float8_e4m3fn and 0 < capability < 89:
            raise ValueError(
                f"a float8_e4m3fn cache needs compute capability 8.9, this GPU has "
                f"{capability // 10}.{capability % 10}: use bfloat16"
            )
        if scale <= 0:
            raise ValueError(f"scale is {scale}, expected more than 0")
        if query.stride(2) != 1:
            raise ValueError("the last dimension of query is not contiguous")
        if not key_cache.is_contiguous():
            raise ValueError("key_cache is not contiguous")
        _, page, kv_heads, head_dim = key_cache.shape
        factor, cap = score_factors(scale, soft_cap)
        constants = {
            "GROUP": query.shape[1] // kv_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_DIM": max(16, triton.next_power_of_2(head_dim)),
            "PAGE": page,
            "SOFT_CAP": soft_cap is not None,
            "COMPUTE": _COMPUTE[dtype],
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        }
        return cls(factor, cap, value_scale, sliding_window, constants)


def score_factors(scale: float, soft_cap: float | None) -> tuple[float, float]:
    """`factor` and `cap` of `base2_scores`.

    Without a cap c the scores in base 2 are q.k * scale * log2(e). With one they are
    c * log2(e) * tanh(q.k * scale / c), and tanh(x) = 1 - 2 / (1 + 2**(2 * log2(e) * x)).
    """
    if soft_cap is None:
        return scale * _LOG2_E, 0.0
    return 2 * _LOG2_E * scale / soft_cap, soft_cap * _LOG2_E


@triton.jit
def base2_scores(
    products: tl.tensor, factor: tl.tensor, cap: tl.tensor, SOFT_CAP: tl.constexpr
) -> tl.tensor:
    """Products of queries and keys as exponents of two."""
    scores = products * factor
    if SOFT_CAP:
        # From 2**126 on the quotient is 0 at any rate. Near 0 it is off by the rounding of 1 - 1.
        scores = cap - 2 * cap / (1 + tl.exp2(tl.minimum(scores, 126.0)))
    return scores


@triton.jit
def lowest(rows: tl.constexpr) -> tl.tensor:
    """The maximum of no scores: finite, so that a row which a tile hides altogether makes no NaN."""
    return tl.full((rows,), -1e30, tl.float32)
