"""The text of one answer: decoded once at the end, or token by token where stop strings may end it."""

from collections.abc import Sequence

from kvrelay_router.text.detokenize import Detokenizer
from kvrelay_router.text.stop_strings import StopStrings


class AnswerText:
    """Owns the detokenizer and the stop strings of one answer."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: Sequence[str] = (),
        keep_stop: bool = False,
        unsearched: int = 0,
    ) -> None:
        """Begin an answer.

        Args:
            detokenizer: fresh, for this answer alone.
            stops: strings that end it.
            keep_stop: leave what ended the answer in its text.
            unsearched: the text of this many tokens may hold a stop string (`min_tokens`).
        """
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._keep_stop = keep_stop
        self._unsearched = unsearched
        self._text: list[str] = []
        self._tokens = 0

    @property
    def stop_string(self) -> str | None:
        """The one that was met."""
        return self._stops.found

    def push(self, token: int) -> bool:
        """Take one token; True when it completed a stop string."""
        self._tokens += 1
        text = self._detokenizer.push((token,))
        if self._unsearched > 0:
            self._unsearched -= 1
            self._text.append(text)
            return False
        self._text.append(self._stops.push(text))
        return self._stops.found is not None

    def finish(self, tokens: Sequence[int]) -> str:
        """The whole text, now that the answer is `tokens`; those pushed already are the first."""
        if self._stops.found is None:
            # Nothing is searched any more: what is held back belongs to the text.
            end = self._detokenizer.push(tokens[self._tokens :]) + self._detokenizer.flush()
            self._text += (self._stops.flush(), end)
        elif self._keep_stop:
            self._text.append(self._stops.found)
        return "".join(self._text)
