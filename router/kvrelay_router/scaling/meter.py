"""How many prompt tokens a second are asked for: the one rate that the scaler is told."""

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 180.0
"""Long enough to average prompts that differ in length by a factor of a thousand. What comes faster
than that shows in the backlog.
"""
_LEAST_S = 30.0


@dataclass(slots=True)
class DemandMeter:
    """Prompt tokens of arriving requests, less the share that prefix caches save of late.

    The average is over the window, or over the time since the first request where that is shorter, but
    never over less than half a minute: one long prompt after a start is no trend.
    """

    window_s: float = WINDOW_S
    _began: float | None = None
    _arrived: deque[tuple[float, int]] = field(default_factory=deque)
    _tokens: int = 0
    _computed: deque[tuple[float, int, int]] = field(default_factory=deque)
    _prompt: int = 0
    _cached: int = 0

    def arrived(self, now: float, tokens: int) -> None:
        """A request with a prompt of `tokens` was admitted."""
        if self._began is None:
            self._began = now
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
        seen = 0.0 if self._began is None else now - self._began
        return self._tokens / min(self.window_s, max(_LEAST_S, seen)) * (1.0 - cached)

    def _forget(self, now: float) -> None:
        edge = now - self.window_s
        while self._arrived and self._arrived[0][0] <= edge:
            self._tokens -= self._arrived.popleft()[1]
        while self._computed and self._computed[0][0] <= edge:
            _, prompt, cached = self._computed.popleft()
            self._prompt -= prompt
            self._cached -= cached
