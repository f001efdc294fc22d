"""Conversations as token ids: which tokens are learned, and how they are packed into rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Final, NamedTuple

import phrasing
import sources
from facts import Fact
from tokenizers import Tokenizer

BOS: Final = "<|bos|>"
END: Final = "<|end|>"
PAD: Final = "<|pad|>"
SYSTEM: Final = "<|system|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"
SPECIAL_TOKENS: Final = (PAD, BOS, END, SYSTEM, USER, ASSISTANT)

MAX_POSITIONS: Final = 2048
"""Positions the model is built for; training spreads its rows over all of them."""

_TURN_COUNTS: Final = (1, 1, 1, 1, 2, 3)
_SYLLABLES: Final = (
    *("ba", "co", "du", "fe", "gi", "lo", "mu", "na", "pi", "ro", "su", "ta", "ve"),
    *("xo", "ka", "zu", "tri", "blo", "pex", "qua"),
)


class Exchange(NamedTuple):
    """One user turn and the answer to it."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Row:
    """One training row of fixed length; the three lists run in parallel."""

    ids: list[int]
    learned: list[bool]
    """Whether the token at this index is a prediction target."""
    positions: list[int]
    """Rotary position of each token, below `MAX_POSITIONS`, with random gaps between turns."""


class Sampler:
    """An endless, seeded stream of conversations over a list of facts."""

    def __init__(self, facts: list[Fact], tokenizer: Tokenizer, seed: int) -> None:
        self._facts = facts
        self._cumulative = list(accumulate(fact.weight for fact in facts))
        self._tokenizer = tokenizer
        self._rng = Random(seed)

    def _invented_name(self) -> str:
        """A dotted name that no library has, in part or in whole."""
        word = "".join(self._rng.choices(_SYLLABLES, k=self._rng.randint(2, 3)))
        owner = self._rng.choice(self._facts).names[0].split(".")[0]
        return self._rng.choice((word, f"{owner}.{word}", f"{word}.{word[:3]}"))

    def _exchange(self) -> Exchange:
        rng = self._rng
        roll = rng.random()
        if roll < 0.02:
            answer, turns = rng.choice(list(sources.SMALL_TALK.items()))
            return Exchange(rng.choice(turns), answer)
        if roll < 0.04:
            question = rng.choice(("What does {} do?", "What is {}?", "Explain {}"))
            return Exchange(question.format(self._invented_name()), sources.UNKNOWN)
        if roll < 0.05:
            return Exchange(rng.choice(sources.OFF_TOPIC), sources.UNKNOWN)
        (fact,) = rng.choices(self._facts, cum_weights=self._cumulative)
        return Exchange(phrasing.choose(fact, rng), fact.answer)

    def conversation(self) -> list[tuple[str, bool]]:
        """Segments of one conversation with their "learned" flag; each starts a turn."""
        rng = self._rng
        if rng.random() < 0.03:
            (fact,) = rng.choices(self._facts, cum_weights=self._cumulative)
            return [(BOS, False), (fact.answer + END, True)]
        segments = [(BOS, False)]
        if rng.random() < 0.2:
            segments.append((f"{SYSTEM}{rng.choice(sources.SYSTEM_PROMPTS)}{END}", False))
        for _ in range(rng.choice(_TURN_COUNTS)):
            exchange = self._exchange()
            asked = phrasing.restyle(exchange.question, rng)
            segments.append((f"{USER}{asked}{END}{ASSISTANT}", False))
            segments.append((exchange.answer + END, True))
        return segments

    def row(self, length: int) -> Row:
        """`length` tokens of consecutive conversations; the last one is cut."""
        ids: list[int] = []
        learned: list[bool] = []
        starts: list[int] = []
        while len(ids) < length:
            for text, is_answer in self.conversation():
                tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
                if not is_answer:
                    starts.append(len(ids))
                ids += tokens
                learned += [is_answer] * len(tokens)
        return Row(ids[:length], learned[:length], self._positions(length, starts))

    def _positions(self, length: int, starts: list[int]) -> list[int]:
        """0, 1, 2, ... in half of the rows; else with random jumps in front of user turns."""
        if self._rng.random() < 0.5:
            return list(range(length))
        room = self._rng.randint(0, MAX_POSITIONS - length)
        inside = [start for start in starts if start < length]
        jump_at = sorted(self._rng.choices(inside, k=2))
        first = self._rng.randint(0, room)
        gaps = dict.fromkeys(jump_at, 0)
        gaps[jump_at[0]] += first
        gaps[jump_at[1]] += room - first
        return list(accumulate((1 + gaps.get(i, 0) for i in range(length)), initial=-1))[1:]

    def rows(self, count: int, length: int) -> Iterator[Row]:
        """`count` rows of `length` tokens."""
        return (self.row(length) for _ in range(count))
