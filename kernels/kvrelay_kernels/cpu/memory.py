"""Memory for what every step reads in full."""

import mmap

import torch

_HUGE_PAGE = 2 << 20


def huge_tensor(nbytes: int) -> torch.Tensor:
    """`[nbytes]` uint8, page-aligned and on huge pages where the system gives them.

    A step streams all weights; with 4 KiB pages it would also walk a page table entry every 64 lines,
    and filling them would fault 512 times as often.
    """
    size = max(nbytes, 1)
    if size < _HUGE_PAGE:
        return torch.empty(size, dtype=torch.uint8)[:nbytes]
    mapping = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes)
