"""A sequence's life stages, without torch: what was asked, and its tokens and blocks while it runs."""

from dataclasses import dataclass, field
from enum import StrEnum

from kvrelay_engine.batch import SamplingHistory, SequenceSlice
from kvrelay_engine.cache.allocator import Allocation, BlockAllocator
from kvrelay_engine.cache.hashing import hash_full_blocks, next_hash, root_hash
from kvrelay_engine.sampler.token_counts import TokenCounts
from kvrelay_protocol.errors import InvalidRequest, KvrelayError
from kvrelay_protocol.sampling import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended by itself."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One attempt at a request, as the router submitted it."""

    sequence_id: int
    request_id: str
    tokens: tuple[int, ...]
    """Prompt, followed on a replay by the tokens already emitted."""
    output_offset: int
    """Index in the request's output of the next token."""
    max_tokens: int
    """Tokens still to generate, at least 1."""
    stop_token_ids: frozenset[int]
    sampling: SamplingParams
    deadline_s: float
    """Seconds the request had left when it was dispatched."""
    traceparent: str = ""
    cache_salt: bytes = b""

    def check(self, vocab_size: int) -> None:
        """Refuse what no step could compute; in a step it would end every sequence of the worker.

        Raises:
            InvalidRequest: naming what is wrong.
        """
        if not self.tokens or self.max_tokens < 1:
            raise InvalidRequest(
                f"{len(self.tokens)} prompt tokens and {self.max_tokens} to generate; "
                "at least one of each is needed"
            )
        if max(self.tokens) >= vocab_size:
            raise InvalidRequest(
                f"token {max(self.tokens)} is outside the model's vocabulary of {vocab_size}"
            )
        if self.sampling.min_tokens and max(self.stop_token_ids, default=0) >= vocab_size:
            raise InvalidRequest(
                f"stop token {max(self.stop_token_ids)} is outside the model's vocabulary of "
                f"{vocab_size}, so min_tokens cannot keep it from being drawn"
            )

    def finish_reason(self, token: int, generated: int) -> FinishReason | None:
        """Whether `token`, the `generated`-th of this attempt, is the last."""
        if token in self.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if generated >= self.max_tokens else None


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """The engine can't go on with a sequence; the others are not concerned."""

    sequence_id: int
    error: KvrelayError


@dataclass(slots=True)
class SequenceState:
    """Tokens and blocks of a sequence that holds KV. Owned by one scheduler; `free` ends it.

    ```
    tokens  0 ........... computed ............ len(tokens)
            | KV written  | to compute          |
    blocks  `- published up to `published` full blocks -`
    ```
    """

    spec: SequenceSpec
    tokens: list[int]
    allocation: Allocation
    root: bytes
    blocks: list[int] = field(init=False)
    computed: int = field(init=False)
    """Positions whose KV is in the pool."""
    published: int = field(init=False)
    """Leading full blocks that are in the prefix index (or equal one that is)."""
    last_hash: bytes = field(init=False)
    counts: TokenCounts | None = field(init=False)
    """None where no penalty applies."""

    def __post_init__(self) -> None:
        self.blocks = list(self.allocation.blocks)
        self.computed = 0
        self.published = 0
        self.last_hash = self.root
        # On a replay the tokens emitted already stand behind the prompt.
        prompt = len(self.spec.tokens) - self.spec.output_offset
        self.counts = (
            TokenCounts(self.tokens[:prompt], self.tokens[prompt:])
            if self.spec.sampling.penalised
            else None
        )

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.spec.tokens)

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.computed

    def reuse(self, positions: int, block_size: int, hashes: list[bytes]) -> None:
        """Take the first `positions` as computed; `hashes` are those of the prompt's full blocks."""
        self.computed = positions
        self.published = positions // block_size
        if self.published:
            self.last_hash = hashes[self.published - 1]

    def slice(self, num_tokens: int) -> SequenceSlice:
        """The next `num_tokens` to compute; samples when they are the last ones."""
        end = self.computed + num_tokens
        samples = end == len(self.tokens)
        return SequenceSlice(
            sequence_id=self.spec.sequence_id,
            tokens=tuple(self.tokens[self.computed : end]),
            start=self.computed,
            block_table=tuple(self.blocks),
            sampling=self.spec.sampling if samples else None,
            history=self._history() if samples else None,
        )

    def append(self, token: int) -> None:
        """The next output token was sampled."""
        self.tokens.append(token)
        if self.counts is not None:
            self.counts.add(token)

    def _history(self) -> SamplingHistory | None:
        spec = self.spec
        too_short = spec.output_offset + self.generated < spec.sampling.min_tokens
        if self.counts is None and not too_short:
            return None
        return SamplingHistory(self.counts, tuple(spec.stop_token_ids) if too_short else ())

    def advance(self, num_tokens: int, allocator: BlockAllocator) -> None:
        """`num_tokens` more positions are written: publish the blocks they filled."""
        self.computed += num_tokens
        size = allocator.block_size
        while (self.published + 1) * size <= self.computed:
            first = self.published * size
            self.last_hash = next_hash(self.last_hash, self.tokens[first : first + size])
            allocator.publish(self.blocks[self.published], self.last_hash)
            self.published += 1

    def distrust(self, allocator: BlockAllocator) -> None:
        """The KV is not what the tokens stand for: nobody else may find it."""
        allocator.forget(self.blocks)

    def free(self, allocator: BlockAllocator) -> None:
        allocator.release(self.blocks)
        self.blocks = []


@dataclass(frozen=True, slots=True)
class PrefixLookup:
    """The hashes a new sequence may share."""

    root: bytes
    hashes: list[bytes]


def look_up(
    tokens: list[int] | tuple[int, ...], block_size: int, fingerprint: str, salt: bytes
) -> PrefixLookup:
    """Hash chain of a token sequence's full blocks."""
    root = root_hash(fingerprint, salt)
    return PrefixLookup(root, hash_full_blocks(tokens, block_size, root))


def chunk_size(remaining: int, budget: int, block_size: int) -> int:
    """Prompt tokens to compute now: whole blocks, unless the rest of the prompt fits.

    Whole blocks, so that a chunk never leaves a partial block that a later chunk would have to send again.
    """
    if remaining <= budget:
        return remaining
    return budget // block_size * block_size
