"""How fast bytes came, and how fast they came at best."""

import threading
import time
from collections import defaultdict

SLOT_S = 0.05
WINDOW_SLOTS = 5
"""The best quarter of a second: shorter ones measure socket buffers."""


class RateMeter:
    """Counts bytes by the moment they arrive. Any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._slots: dict[int, int] = defaultdict(int)

    def add(self, nbytes: int, now: float | None = None) -> None:
        """`nbytes` have arrived."""
        moment = time.monotonic() if now is None else now
        with self._lock:
            self._slots[int((moment - self._begun) / SLOT_S)] += nbytes

    def best(self) -> float | None:
        """Bytes a second in the best window, None where the whole took less than two of them."""
        with self._lock:
            if not self._slots or max(self._slots) - min(self._slots) + 1 < 2 * WINDOW_SLOTS:
                return None
            windows = (
                sum(self._slots.get(slot + i, 0) for i in range(WINDOW_SLOTS))
                for slot in range(min(self._slots), max(self._slots) - WINDOW_SLOTS + 2)
            )
            return max(windows) / (WINDOW_SLOTS * SLOT_S)
