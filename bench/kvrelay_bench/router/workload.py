"""What one measurement sends through the router, and the tokens its mock workers answer with."""

from dataclasses import dataclass
from random import Random

from kvrelay_router.text.tokenizer import Tokenizer

_WORDS = ("the", "router", "takes", "request", "and", "finds", "two", "workers", "for", "it", "one",
          "reads", "prompt", "other", "writes", "answer", "blocks", "of", "keys", "values", "move",
          "between", "them", "while", "next", "layer", "is", "computed")  # fmt: skip
_TABLE_SIZE = 251  # prime: neighbouring seeds walk through it at different places


@dataclass(frozen=True, slots=True)
class Workload:
    """One measurement. Client and mock workers get the same one, as JSON."""

    name: str
    requests: int
    rate: float
    """Requests a second with exponential gaps; 0 sends all at once."""
    tokens: int
    """Output tokens of every request."""
    step_s: float
    """Seconds between decode steps; 0 sends steps as fast as the router takes them."""
    prefill_s: float
    """Seconds the mock prefill worker waits before a first token."""
    path: str
    """`disaggregated` or `local`."""
    prompt_words: int
    seed: int
    warmup: int = 0
    """Requests at the start that count for nothing."""
    gate: int = 1
    """The mock decode worker makes its first step when this many sequences are there."""

    def arrivals(self) -> list[float]:
        """Seconds from the start at which each request is due."""
        if not self.rate:
            return [0.0] * self.requests
        draw, at, due = Random(self.seed), 0.0, []
        for _ in range(self.requests):
            at += draw.expovariate(self.rate)
            due.append(at)
        return due

    def prompt(self, request: int) -> str:
        """Words that differ between requests, so that no two prompts are the same."""
        draw = Random(self.seed * 1_000_003 + request)
        return " ".join(draw.choice(_WORDS) for _ in range(self.prompt_words))


def answer_ids(table: list[int], request: int, count: int) -> list[int]:
    """The answer to a request: known to the mock that gives it and to the client that checks it."""
    return [table[(request * 37 + index * 11) % len(table)] for index in range(count)]


def text_tokens(tokenizer: Tokenizer) -> list[int]:
    """Ids that show text of their own, whatever stands before them."""
    found: list[int] = []
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode([token_id])
        if text.strip() and text.isascii() and text.isprintable():
            found.append(token_id)
        if len(found) == _TABLE_SIZE:
            break
    return found
