"""The text of one answer: detokenised, cut at its stop string."""

from collections.abc import Collection, Sequence

from kvrelay_router.text.detokenize import Detokenizer
from kvrelay_router.text.stop_strings import StopStrings


class OutputText:
    """Owns the detokenizer and the stop strings of one answer."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        hidden: Collection[int] = (),
    ) -> None:
        """Args: ids in `hidden` (what ends a sequence) count as tokens but show no text."""
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self.may_stop = bool(stops)
        """There is a stop string to be met."""
        self._hidden = frozenset(hidden)
        self.tokens = 0
        """Tokens taken in, the one that completed a stop string being the last."""

    def stopped(self) -> bool:
        """A stop string was met; nothing more will be shown."""
        return self._stops.found is not None

    def push(self, ids: Sequence[int]) -> str:
        """New text to show."""
        if not self.may_stop:
            self.tokens += len(ids)
            if not self._hidden.isdisjoint(ids):
                ids = [i for i in ids if i not in self._hidden]
            return self._detokenizer.push(ids)
        shown = ""
        for token_id in ids:
            if self.stopped():
                break
            self.tokens += 1
            if token_id not in self._hidden:
                shown += self._stops.push(self._detokenizer.push([token_id]))
        return shown

    def flush(self) -> str:
        """The rest, when the answer ended."""
        if self.stopped():
            return ""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()
