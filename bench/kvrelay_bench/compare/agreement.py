"""Does an engine compute the same model? Its logits and greedy tokens beside a float32 reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOP = 20
"""Candidates of the first token whose log-probabilities are compared."""

Answer = tuple[Sequence[Sequence[int]], Sequence[Mapping[int, float]]]
"""Greedy tokens of every prompt, and log-probabilities of the first token's candidates."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far an engine's answers are from the reference's."""

    prompts: int
    first_tokens: int
    """Prompts whose first greedy token is the reference's."""
    near_ties: int
    """Other prompts: the reference holds both tokens less than `tie` apart."""
    greedy_tokens: int
    """Tokens that agree before the first that differs, over all prompts."""
    of_greedy_tokens: int
    max_logprob_error: float
    """Largest difference among the candidates that both name."""

    @property
    def sound(self) -> bool:
        """No first token differs but where rounding decides."""
        return self.first_tokens + self.near_ties == self.prompts

    def __str__(self) -> str:
        return (
            f"first tokens {self.first_tokens}/{self.prompts}"
            f"{f' (+{self.near_ties} near ties)' if self.near_ties else ''}, "
            f"greedy tokens {self.greedy_tokens}/{self.of_greedy_tokens}, "
            f"log-probabilities within {self.max_logprob_error:.3f}"
        )


def compare_answers(found: Answer, reference: Answer, *, tie: float = 0.1) -> Agreement:
    """Compare what an engine and the reference answered to the same prompts."""
    tokens, logprobs = found
    expected, expected_logprobs = reference
    firsts = [(row[0], other[0]) for row, other in zip(tokens, expected, strict=True)]
    errors = [
        abs(row[token] - other[token])
        for row, other in zip(logprobs, expected_logprobs, strict=True)
        for token in row.keys() & other.keys()
    ]
    return Agreement(
        prompts=len(expected),
        first_tokens=sum(mine == theirs for mine, theirs in firsts),
        near_ties=sum(
            mine != theirs and mine in held and held[theirs] - held[mine] < tie
            for (mine, theirs), held in zip(firsts, expected_logprobs, strict=True)
        ),
        greedy_tokens=sum(
            _common_prefix(row, other) for row, other in zip(tokens, expected, strict=True)
        ),
        of_greedy_tokens=sum(map(len, expected)),
        max_logprob_error=max(errors, default=float("nan")),
    )


def _common_prefix(row: Sequence[int], other: Sequence[int]) -> int:
    for index, (mine, theirs) in enumerate(zip(row, other, strict=True)):
        if mine != theirs:
            return index
    return len(row)
