"""What a scheduler hands to the engine for one step, and what comes back.

Three life stages of a step, three types: `Batch` is decided by a scheduler (no torch), `PreparedBatch`
(in `runner`) holds its tensors, `StepResult` carries the sampled tokens back to the scheduler.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvrelay_engine.sampler.token_counts import TokenCounts
from kvrelay_protocol.errors import KvrelayError
from kvrelay_protocol.sampling import SamplingParams

LayersDone = Callable[[int, int], None]
"""Called by the engine as `(first_layer, end_layer)` when the KV of those layers is written for every
slice of the running step, while later layers have still to be computed."""


@dataclass(frozen=True, slots=True)
class SamplingHistory:
    """What the tokens so far mean for the next one."""

    counts: TokenCounts | None = None
    """None: no penalty applies."""
    banned: tuple[int, ...] = ()
    """Tokens that must not come next: what would end the answer before `min_tokens`."""


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """The part of one sequence that one step computes.

    ```
    positions   0 ............ start ........... start + len(tokens)
                | KV in the pool | computed now  |
                `------ block_table covers all of it, plus the rest of the last block
    ```
    """

    sequence_id: int
    tokens: tuple[int, ...]
    """Token ids to compute, at positions `start ... start + len(tokens) - 1`; never empty."""
    start: int
    block_table: tuple[int, ...]
    """Physical block of each logical block; the block of position p is `block_table[p // block_size]`."""
    sampling: SamplingParams | None
    """None: more of the prompt follows, nothing is sampled. Otherwise one token is sampled for the
    position `start + len(tokens)`, with that position as the sampler's counter."""
    history: SamplingHistory | None = None
    """None, as for most: `sampling` needs nothing but the logits."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: slices of distinct sequences, prompt chunks and single decode tokens alike."""

    slices: tuple[SequenceSlice, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.slices)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities: of a sampled token, and of the most likely ones.

    They are the model's own, before temperature, penalties and bans.
    """

    logprob: float
    rank: int
    """1 for the most likely token; how many tokens are at least as likely."""
    top: tuple[tuple[int, float], ...]
    """(token, logprob), most likely first; as many as `SamplingParams.logprobs` asked for."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """For every slice that asked for a token, by sequence id: the token, or why there is none."""

    tokens: Mapping[int, int]
    errors: Mapping[int, KvrelayError] = field(default_factory=dict)
    """The KV of these sequences is not to be trusted either."""
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    """Of the sequences that asked for them."""
