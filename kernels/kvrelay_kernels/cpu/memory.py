"""Memory for what every step reads in full."""

import mmap

import torch

_HUGE_PAGE = 2 << 20


def huge_tensor(nbytes: int) -> torch.Tensor:
    """`[nbytes]` uint8, page-aligned; on aligned huge pages where it is large and the system gives them.

    A step streams all weights; with 4 KiB pages it would also walk a page table entry every 64 lines,
    and filling them would fault 512 times as often.
    """
    size = max(nbytes, 1)
    if size < _HUGE_PAGE:
        return torch.empty(size, dtype=torch.uint8)[:nbytes]
    # Private: anonymous memory that is shared counts as a file, which rarely gets huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    # One page more than needed, so that an aligned run of the size lies within.
    mapping = mmap.mmap(-1, (size // _HUGE_PAGE + 2) * _HUGE_PAGE, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + nbytes]
