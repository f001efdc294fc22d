"""Launcher of the paged attention kernels: one query a sequence here, several there.

Nothing waits for the GPU. The decode part reads every length on the device, and its grid depends on
the shapes alone, so a captured graph replays it with other lengths; the grid of the prefill part
comes from `host_query_lens`.
"""

import torch

from kvrelay_kernels.cuda.paged_decode import paged_decode_cuda
from kvrelay_kernels.cuda.paged_prefill import paged_prefill_cuda
from kvrelay_kernels.cuda.paged_softmax import AttentionTraits
from kvrelay_kernels.layout import AttentionLayout


def paged_attention_cuda(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    out: torch.Tensor,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """`kvrelay_kernels.paged_attention.paged_attention` on a GPU.

    Args:
        query: as there; bfloat16 or float16 (float32 works, slowly).
        key_cache: as there; the dtype of `query`, or float8_e4m3fn from compute capability 8.9 on.
        value_cache: like `key_cache`.
        layout: as there. Decode rows with a context of 0 are padding and get zeros.
        scale: as there, more than 0.
        sliding_window: as there.
        soft_cap: as there.
        out: as there.
        key_scale: factor that turns stored keys into keys.
        value_scale: factor that turns stored values into values.

    Raises:
        ValueError: a dtype, a stride or a scale that the kernels do not take.
    """
    traits = AttentionTraits.of(
        query,
        key_cache,
        scale=scale * key_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        value_scale=value_scale,
    )
    decodes = layout.num_decodes
    if decodes:
        paged_decode_cuda(query, key_cache, value_cache, layout, traits, out=out)
    if decodes < len(layout.host_query_lens):
        paged_prefill_cuda(query, key_cache, value_cache, layout, traits, out=out)
    return out
