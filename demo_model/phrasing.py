"""How people ask: question templates per kind of fact, and small variations of writing."""

from dataclasses import dataclass
from random import Random
from typing import Final
from zlib import crc32

from facts import Fact, Kind

HELD_OUT_SHARE: Final = 24
"""One in this many (fact, name, template) combinations is kept out of training."""

_GENERAL: Final = (
    "What does {} do?",
    "What is {}?",
    "Explain {}",
    "How do I use {}?",
    "What's {}?",
    "What is {} for?",
    "What is {} used for?",
    "Tell me about {}",
    "Describe {}",
    "How does {} work?",
    "Can you explain {}?",
    "What does {} do in Python?",
    "What is {} in Python?",
    "When do I use {}?",
    "{}",
)
_CALLABLE: Final = (
    *_GENERAL,
    "What does {}() do?",
    "Explain {}()",
    "What does {} return?",
    "How do I call {}?",
    "help({})",
)
_TEMPLATES: Final[dict[Kind, tuple[str, ...]]] = {
    Kind.FUNCTION: (*_CALLABLE, "What does the {} function do?", "Explain the {} function"),
    Kind.METHOD: (*_CALLABLE, "What does the {} method do?", "Explain the {} method"),
    Kind.CLASS: (*_CALLABLE, "What is the {} class?", "Explain the {} class"),
    Kind.EXCEPTION: (
        *_GENERAL,
        "When is {} raised?",
        "What does {} mean?",
        "Why do I get a {}?",
        "What is a {}?",
    ),
    Kind.MODULE: (
        *_GENERAL,
        "What is the {} module?",
        "What does the {} module do?",
        "Explain the {} module",
        "What is the {} module for?",
        "What is in the {} module?",
    ),
    Kind.STATEMENT: (
        *_GENERAL[:-1],
        "Explain the {} statement",
        "What does the {} statement do?",
        "What is the {} statement?",
        "How does the {} statement work?",
        "How do I use the {} statement?",
        "What is a {} statement?",
        "Explain {} statements",
        "What does the {} keyword do?",
    ),
    Kind.TOPIC: (
        "What is {}?",
        "What are {}?",
        "Explain {}",
        "Tell me about {}",
        "Describe {}",
        "How do I use {}?",
        "How does {} work?",
        "How do {} work?",
        "What does {} mean?",
        "Can you explain {}?",
        "What does {} do?",
    ),
    Kind.DUNDER: (*_GENERAL, "What is the {} method?", "What does the {} method do?"),
}
_FROM_OWNER: Final = (
    "What does {short} from {owner} do?",
    "What is {short} in the {owner} module?",
    "Explain {short} from {owner}",
)
_TASK: Final = (
    "How do I {}?",
    "How can I {}?",
    "How to {}",
    "What is the way to {}?",
    "I want to {}",
    "Show me how to {}",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One way to ask for a fact."""

    text: str
    held_out: bool
    """True when no training sample may contain this phrasing of this fact."""


def _template_questions(fact: Fact) -> list[str]:
    asked = [template.format(name) for name in fact.names for template in _TEMPLATES[fact.kind]]
    owner, _, short = fact.names[0].rpartition(".")
    if owner and fact.kind in (Kind.FUNCTION, Kind.CLASS):
        asked += [template.format(short=short, owner=owner) for template in _FROM_OWNER]
    return asked


def questions(fact: Fact) -> list[Question]:
    """Every question for a fact, in a fixed order; the how-to ones are never held out."""
    asked = [
        Question(text, held_out=crc32(f"{fact.key}\n{text}".encode()) % HELD_OUT_SHARE == 0)
        for text in _template_questions(fact)
    ]
    tasks = [template.format(task) for task in fact.tasks for template in _TASK]
    return asked + [Question(text, held_out=False) for text in tasks]


def choose(fact: Fact, rng: Random) -> str:
    """One training question; the full name and how-to tasks come up more often than aliases."""
    trained = [q.text for q in questions(fact) if not q.held_out]
    if fact.tasks and rng.random() < 0.3:
        return rng.choice(_TASK).format(rng.choice(fact.tasks))
    if rng.random() < 0.5:
        full = [text for text in trained if fact.names[0] in text]
        return rng.choice(full or trained)
    return rng.choice(trained)


def restyle(question: str, rng: Random) -> str:
    """The same question as hurried or polite people write it."""
    if rng.random() < 0.25:
        question = question.rstrip("?")
    elif question[-1].isalpha() and rng.random() < 0.3:
        question += rng.choice((".", "?", "!"))
    first = question.split(" ", 1)[0]
    if " " in question and first.isalpha() and rng.random() < 0.25:
        question = question[0].lower() + question[1:]
    roll = rng.random()
    if roll < 0.03:
        return "Please " + question[0].lower() + question[1:] if " " in question else question
    if roll < 0.06:
        return rng.choice(("Hi! ", "Hello, ", "Hey, ")) + question
    return question
