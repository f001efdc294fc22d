"""Which tokens a sequence holds and how often it generated each: what penalties are computed from."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_FIRST_CAPACITY = 64


class TokenCounts:
    """Distinct tokens of one sequence; adding one costs the same however long the sequence is.

    Changed only between steps: arrays handed out are views, valid for the step that asked.
    """

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Args: `prompt` as the request sent it; `output` are the tokens generated since."""
        distinct = list(dict.fromkeys(prompt))
        self._slot_of = {token: slot for slot, token in enumerate(distinct)}
        capacity = max(_FIRST_CAPACITY, 2 * len(distinct))
        self._tokens = np.zeros(capacity, dtype=np.int64)
        self._tokens[: len(distinct)] = distinct
        self._counts = np.zeros(capacity, dtype=np.int32)
        for token in output:
            self.add(token)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """`[distinct]`."""
        return self._tokens[: len(self._slot_of)]

    @property
    def output_counts(self) -> NDArray[np.int32]:
        """`[distinct]`: how often each of `tokens` was generated; 0 where only the prompt has it."""
        return self._counts[: len(self._slot_of)]

    def add(self, token: int) -> None:
        """One more token was generated."""
        slot = self._slot_of.setdefault(token, len(self._slot_of))
        if slot == len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._tokens[slot] = token
        self._counts[slot] += 1
