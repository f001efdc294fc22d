"""What the two endpoints' answers look like; `chat` and `completions` each have one."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Frames(Protocol):
    """Renders one request's answer, as a stream of chunks or as one object."""

    def opening(self, index: int) -> bytes:
        """What comes before an answer's first text; may be empty."""

    def delta(self, index: int, text: str, usage: Mapping[str, Any] | None) -> bytes:
        """A piece of text; `usage` where the client wants it in every chunk."""

    def finish(self, index: int, reason: str) -> bytes:
        """The end of one answer."""

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The chunk without choices."""

    def whole(
        self,
        answers: Sequence[tuple[str, str]],
        usage: Mapping[str, Any],
    ) -> dict[str, Any]:
        """One object; `answers` are text and finish reason by index."""
