"""Where a supervisor writes: phases with their seconds, and the children's lines with their names."""

import contextlib
import sys
import threading
import time
from typing import TextIO


class Console:
    """Whole lines from several threads onto one stream. A reader that went away stops nothing."""

    def __init__(self, stream: TextIO | None = None, *, relay: bool = True) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._relay = relay
        self.name_width = 0
        """Of the longest child's name, so that what they say stands in one column."""
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def line(self, text: str = "") -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._stream.write(text + "\n")
            self._stream.flush()

    def child_line(self, name: str, text: str) -> None:
        if self._relay:
            label = f"[{name}]"
            self.line(f"{label:<{self.name_width + 2}} {text}")

    def phase(self, name: str, detail: str, *, seconds: float | None = None) -> None:
        """One start-up phase and how long it took, by default since the console was made."""
        spent = time.monotonic() - self._began if seconds is None else seconds
        self.line(f"  {name:<9}{spent:6.2f} s  {detail}".rstrip())
