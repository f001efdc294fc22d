"""How many prompt tokens a second are asked for: the one rate that the scaler is told."""

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 60.0


@dataclass(slots=True)
class DemandMeter:
    """Prompt tokens of arriving requests, less the share that prefix caches save of late.

    The average is over the whole window even before it has passed: one long prompt after a start is
    no trend.
    """

    window_s: float = WINDOW_S
    _arrived: deque[tuple[float, int]] = field(default_factory=deque)
    _tokens: int = 0
    _computed: deque[tuple[float, int, int]] = field(default_factory=deque)
    _prompt: int = 0
    _cached: int = 0

    def arrived(self, now: float, tokens: int) -> None:
        """A request with a prompt of `tokens` was admitted."""
        self._arrived.append((now, tokens))
        self._tokens += tokens
        self._forget(now)

    def computed(self, now: float, *, prompt: int, cached: int) -> None:
        """A prompt of that many tokens was computed, `cached` of which came from a prefix cache."""
        self._computed.append((now, prompt, cached))
        self._prompt += prompt
        self._cached += cached
        self._forget(now)

    def tokens_per_second(self, now: float) -> float:
        self._forget(now)
        cached = self._cached / self._prompt if self._prompt else 0.0
        return self._tokens / self.window_s * (1.0 - cached)

    def _forget(self, now: float) -> None:
        edge = now - self.window_s
        while self._arrived and self._arrived[0][0] <= edge:
            self._tokens -= self._arrived.popleft()[1]
        while self._computed and self._computed[0][0] <= edge:
            _, prompt, cached = self._computed.popleft()
            self._prompt -= prompt
            self._cached -= cached
