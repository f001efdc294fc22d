"""Ctrl-C between steps rather than inside one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class DeferredInterrupt:
    """Holds SIGINT back until `check`, so that a step ends and is accounted for first.

    A second one is not held back. Elsewhere than on the main thread, where Python delivers no
    signals, and where SIGINT has no Python handler, it does nothing.
    """

    def __init__(self) -> None:
        self._pending = False
        self._installed = False
        self._previous: signal._HANDLER = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if callable(previous) and not isinstance(previous, signal.Handlers):
                self._previous = signal.signal(signal.SIGINT, self._note)
                self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed:
            self._installed = False
            signal.signal(signal.SIGINT, self._previous)
        if error is None:
            self.check()

    def check(self) -> None:
        """Deliver what was held back: as a rule this raises KeyboardInterrupt."""
        if self._pending:
            self._pending = False
            self._deliver(signal.SIGINT, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pending:
            self._deliver(number, frame)
        self._pending = True

    def _deliver(self, number: int, frame: FrameType | None) -> None:
        if callable(self._previous):
            self._previous(number, frame)
