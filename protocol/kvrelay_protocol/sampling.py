"""How the next token is chosen: one value type, the same on the wire and in the engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one request; immutable, validated at the edge.

    The draw is a function of (seed, position, logits) alone, so batching, the prefill/decode split,
    preemption and replay cannot change it.
    """

    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it. Range 0 to 2."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this. Range (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one. Range [0, 1]."""
    seed: int = 0
    """64-bit key of the counter-based generator. The router draws one where the client gave none."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0
