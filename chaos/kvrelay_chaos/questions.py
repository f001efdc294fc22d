"""What the load asks, and what is the right answer to it."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvrelay import ChatOptions, Message

_SUBJECTS = ("os.path.join", "len", "sorted", "dict.get", "str.split", "json.dumps", "re.sub", "zip",
             "itertools.chain", "functools.partial", "open", "enumerate", "sum", "range")  # fmt: skip
_FORMS = ("What does {} do?", "How do I use {}?", "Explain {}.", "What does {} return?")
_SENTENCE = "You answer questions about Python, in one or two sentences and without examples. "
_PREFIX_SENTENCES = (0, 0, 1, 4, 12, 30)
"""How often the shared system text is repeated: prompts from a few to some hundred tokens."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request, whose answer is a function of it alone: greedy, or sampled with a seed."""

    number: int
    text: str
    system: str
    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool

    @property
    def messages(self) -> list[Message]:
        asked: Message = {"role": "user", "content": self.text}
        return [{"role": "system", "content": self.system}, asked] if self.system else [asked]

    @property
    def options(self) -> ChatOptions:
        extra: dict[str, Any] = {"ignore_eos": True} if self.ignore_eos else {}
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "extra": extra,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """What an undisturbed stack says."""

    text: str = field(repr=False)
    finish_reason: str


def draw_questions(count: int, seed: int) -> list[Question]:
    """Different questions, most of them with one of a few shared beginnings."""
    dice = random.Random(f"kvrelay chaos questions {seed}")
    texts = [form.format(subject) for form, subject in itertools.product(_FORMS, _SUBJECTS)]
    return [
        Question(
            number=number,
            text=dice.choice(texts),
            system=_SENTENCE * dice.choice(_PREFIX_SENTENCES),
            max_tokens=dice.choice((1, 4, 12, 24, 48, 96)),
            temperature=dice.choice((0.0, 0.0, 0.7, 1.0)),
            seed=dice.getrandbits(31),
            ignore_eos=dice.random() < 0.6,
        )
        for number in range(count)
    ]


Catalogue = Sequence[tuple[Question, Answer]]
"""Questions with their answers."""
