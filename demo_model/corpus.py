"""The corpus: facts of the interpreter's own library as question and answer pairs.

`python demo_model/corpus.py` prints its size, its digest and some pairs.
"""

import hashlib
import json
from typing import Final, NamedTuple

import phrasing
import sources
from facts import Fact, collect_facts

_SHOWN: Final = 12


class Pair(NamedTuple):
    """A question, its answer and whether training may see the two together."""

    question: str
    answer: str
    held_out: bool


def build_facts() -> list[Fact]:
    """Every fact, in a fixed order."""
    return collect_facts()


def build_pairs(facts: list[Fact] | None = None) -> list[Pair]:
    """Every question of every fact, small talk included, in a fixed order."""
    pairs = [
        Pair(question.text, fact.answer, question.held_out)
        for fact in (build_facts() if facts is None else facts)
        for question in phrasing.questions(fact)
    ]
    for answer, turns in sources.SMALL_TALK.items():
        pairs += [Pair(turn, answer, held_out=False) for turn in turns]
    return pairs + [Pair(turn, sources.UNKNOWN, held_out=False) for turn in sources.OFF_TOPIC]


def digest(pairs: list[Pair]) -> str:
    """SHA-256 of the pairs in order; equal on every host with the same Python version."""
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def tokenizer_texts(facts: list[Fact]) -> list[str]:
    """What the tokenizer learns from: questions once, answers as often as their weight says."""
    texts = [f"{pair.question}\n" for pair in build_pairs(facts)[::4]]
    for fact in facts:
        texts += [fact.answer] * (4 * fact.weight)
    return texts


def main() -> None:
    """Print what the corpus holds."""
    facts = build_facts()
    pairs = build_pairs(facts)
    print(f"{len(facts)} facts, {len(pairs)} pairs, sha256 {digest(pairs)}")
    for pair in pairs[:: len(pairs) // _SHOWN]:
        print(f"  {pair.question}\n    -> {pair.answer}")


if __name__ == "__main__":
    main()
