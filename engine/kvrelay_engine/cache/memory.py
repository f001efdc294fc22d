"""Zeroed host memory that goes back to the system and stays where it is."""

import mmap
import sys

import torch


class HostMemory:
    """Anonymous private pages: they exist from their first use until `release`, which any number of times.

    Freed with the last reference to `tensor`.
    """

    def __init__(self, nbytes: int) -> None:
        self._pages = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(self._pages, dtype=torch.uint8, count=nbytes)
        """`[nbytes]` uint8."""

    def release(self) -> None:
        """Give the pages back; they read as zeros at the same addresses (madvise(2), MADV_DONTNEED)."""
        if sys.platform == "linux":
            self._pages.madvise(mmap.MADV_DONTNEED)
        else:
            # Elsewhere the advice may do nothing, and need not zero.
            self.tensor.zero_()
