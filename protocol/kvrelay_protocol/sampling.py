"""How the next token is chosen: one value type, the same on the wire and in the engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one request; immutable, validated at the edge.

    The draw is a function of (seed, position, logits) alone, so batching, the prefill/decode split,
    preemption and replay cannot change it. Penalties and `min_tokens` change the logits by what the
    sequence holds, which is the same on every path too.
    """

    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it. 0 to 2 over HTTP."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this. Range (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one. Range [0, 1]."""
    seed: int = 0
    """64-bit key of the counter-based generator. The router draws one where the client gave none."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that was generated before. Range [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token once for each time it was generated before. Range [-2, 2]."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in prompt or answer are divided by it, negative ones multiplied.
    Above 0; 1 changes nothing."""
    min_tokens: int = 0
    """No stop token is drawn before the answer has this many tokens."""
    logprobs: int | None = None
    """How many of the most likely tokens to report with each token, next to the token itself."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change the logits."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )
