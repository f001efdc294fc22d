"""Stop strings over a text that arrives in pieces cut anywhere."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string.

    Holds back only what could be the beginning of a stop string. How the text was cut into pieces
    never matters: the stop string that ends first wins, and of several ending there the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found: str | None = None
        """The stop string met, if any."""

    def push(self, text: str) -> str:
        """What may be shown now. After a stop string was met: nothing."""
        if not self._stops:
            return text
        if self.found is not None or not text:
            return ""
        text = self._held + text
        met = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if met:
            _, start, self.found = min(met)
            self._held = ""
            return text[:start]
        keep = self._possible_beginning(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Index of the earliest character from which the rest begins some stop string."""
        first = max(0, len(text) - self._longest + 1)
        for start in range(first, len(text)):
            rest = text[start:]
            if any(stop.startswith(rest) for stop in self._stops):
                return start
        return len(text)
