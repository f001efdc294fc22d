"""Fetched weights on disk, for workers that start later: files without a name, gone with their process.

Written through the page cache, so memory that somebody needs is not taken from him; what the system
writes back it reads again when a reader comes.
"""

import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path


class KeptFiles:
    """The bytes of weight files, as they arrived. Any thread may call."""

    def __init__(self, folder: Path, sizes: Mapping[str, int], identity: str) -> None:
        """Args:
        folder: where; its file system must hold the weights once.
        sizes: bytes of each file.
        identity: of the weights.
        """
        self.failed = ""
        """Why nothing is kept; empty while all is well."""
        self._identity = identity
        self._lock = threading.Lock()
        self._ranges: dict[str, list[tuple[int, int]]] = {file: [] for file in sizes}
        """Of each file, what is there: disjoint, in order."""
        self._files: dict[str, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, size in sizes.items():
                with tempfile.TemporaryFile(dir=folder) as opened:
                    self._files[file] = os.dup(opened.fileno())
                os.ftruncate(self._files[file], size)
        except OSError as error:
            self._fail(error)

    @property
    def identity(self) -> str:
        """Of exactly these bytes; empty where they are not kept."""
        return "" if self.failed else self._identity

    def keep(self, file: str, start: int, content: memoryview) -> None:
        """Write them; a full disk ends the keeping, not the start."""
        if self.failed:
            return
        try:
            done = 0
            while done < len(content):
                done += os.pwrite(self._files[file], content[done:], start + done)
        except OSError as error:
            self._fail(error)
            return
        with self._lock:
            held = sorted([*self._ranges[file], (start, start + len(content))])
            self._ranges[file] = _joined(held)

    def has(self, file: str, start: int, end: int) -> bool:
        """Whether these bytes of a file can be read."""
        with self._lock:
            held = self._ranges.get(file, [])
        return not self.failed and any(a <= start and end <= b for a, b in held)

    def read(self, file: str, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `start` on, which `has` them."""
        done = 0
        while done < len(into):
            count = os.preadv(self._files[file], [into[done:]], start + done)
            if not count:
                raise OSError(f"{file} ends at {start + done}")
            done += count

    def close(self) -> None:
        """Give the disk space back. Idempotent."""
        with self._lock:
            files, self._files = self._files, {}
            self.failed = self.failed or "closed"
        for descriptor in files.values():
            os.close(descriptor)

    def _fail(self, error: OSError) -> None:
        self.failed = error.strerror or str(error)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours as one."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined
