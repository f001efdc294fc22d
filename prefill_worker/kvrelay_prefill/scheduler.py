"""Which prompts to compute next: first come, first served, chunked and batched. No torch, no clock."""

from collections import deque
from dataclasses import dataclass

from kvrelay_engine.batch import Batch, StepResult
from kvrelay_engine.cache.allocator import BlockAllocator
from kvrelay_engine.runtime.step_loop import LoadSnapshot
from kvrelay_engine.sequence import (
    FinishReason,
    PrefixLookup,
    SequenceFailed,
    SequenceSpec,
    SequenceState,
    chunk_size,
    look_up,
)


@dataclass(frozen=True, slots=True)
class Admitted:
    """A prompt has its blocks; the first `cached_blocks` hold valid KV already."""

    sequence_id: int
    blocks: tuple[int, ...]
    """They don't change until `release`."""
    cached_blocks: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A prompt is computed and its first token sampled. Its blocks stay until `release`."""

    sequence_id: int
    token: int
    finish: FinishReason | None


PrefillEvent = Admitted | FirstToken | SequenceFailed


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A prompt without blocks."""

    spec: SequenceSpec
    lookup: PrefixLookup
    """Hashed once, since the head of the line is looked at in every step."""


class PrefillScheduler:
    """Owner of the allocator and of every prompt's blocks, from admission until `release`.

    ```
    submit ─► waiting ─(blocks at hand)─► computing ─(last chunk)─► held ─► release
    ```

    A prompt takes all its blocks at once, so a started prompt never waits for memory and the pool
    can't be deadlocked by half-computed ones.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        fingerprint: str,
        max_batch_tokens: int,
        max_sequences: int,
    ) -> None:
        self.allocator = allocator
        self._fingerprint = fingerprint
        self._max_batch_tokens = max(max_batch_tokens, allocator.block_size)
        self._max_sequences = max_sequences
        self._waiting: deque[_Waiting] = deque()
        self._computing: dict[int, SequenceState] = {}
        self._held: dict[int, SequenceState] = {}
        self._events: list[PrefillEvent] = []
        self._prefix_queries = 0
        self._prefix_hits = 0

    def submit(self, spec: SequenceSpec) -> None:
        """Queue a prompt."""
        size = self.allocator.block_size
        lookup = look_up(spec.tokens, size, self._fingerprint, spec.cache_salt)
        self._waiting.append(_Waiting(spec, lookup))

    def release(self, sequence_id: int) -> None:
        """Let go of a sequence wherever it is: done with, cancelled or failed. Idempotent."""
        for owners in (self._computing, self._held):
            state = owners.pop(sequence_id, None)
            if state is not None:
                state.free(self.allocator)
                return
        self._waiting = deque(w for w in self._waiting if w.spec.sequence_id != sequence_id)

    def schedule(self) -> Batch | None:
        """The next chunks: prompts already started first, then new ones while blocks and budget last."""
        budget = self._max_batch_tokens
        chunks: list[tuple[SequenceState, int]] = []
        for state in self._computing.values():
            budget -= self._add_chunk(chunks, state, budget)
        while self._waiting and budget >= self.allocator.block_size:
            if len(chunks) >= self._max_sequences:
                break
            admitted = self._admit(self._waiting[0])
            if admitted is None:
                break
            self._waiting.popleft()
            budget -= self._add_chunk(chunks, admitted, budget)
        if not chunks:
            return None
        return Batch(tuple(state.slice(size) for state, size in chunks))

    def commit(self, batch: Batch, result: StepResult) -> None:
        """The step is done: publish full blocks, and hold the prompts that are complete."""
        for part in batch.slices:
            state = self._computing[part.sequence_id]
            error = result.errors.get(part.sequence_id)
            if error is not None:
                state.distrust(self.allocator)
                self._held[part.sequence_id] = self._computing.pop(part.sequence_id)
                self._events.append(SequenceFailed(part.sequence_id, error))
                continue
            state.advance(len(part.tokens), self.allocator)
            if part.sampling is None:
                continue
            token = result.tokens[part.sequence_id]
            self._held[part.sequence_id] = self._computing.pop(part.sequence_id)
            finish = state.spec.finish_reason(token, 1)
            self._events.append(FirstToken(part.sequence_id, token, finish))

    def take_events(self) -> list[PrefillEvent]:
        events, self._events = self._events, []
        return events

    def load(self) -> LoadSnapshot:
        counts = self.allocator.counts
        computing = sum(state.remaining for state in self._computing.values())
        return LoadSnapshot(
            running=len(self._computing),
            waiting=len(self._waiting),
            total_blocks=counts.total,
            free_blocks=counts.free,
            cached_blocks=counts.cached,
            leased_blocks=counts.leased,
            used_blocks=counts.in_use,
            backlog_tokens=computing + sum(len(w.spec.tokens) for w in self._waiting),
            preemptions=0,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
        )

    def check_integrity(self) -> None:
        """No block without an owner, and none left over when nothing runs."""
        self.allocator.check_integrity()
        if not self._computing and not self._held:
            counts = self.allocator.counts
            assert counts.free + counts.cached == counts.total, counts  # noqa: S101 - own invariant

    def _admit(self, head: _Waiting) -> SequenceState | None:
        spec, lookup, size = head.spec, head.lookup, self.allocator.block_size
        # The last prompt token is always computed: its logits give the first output token.
        shareable = lookup.hashes[: (len(spec.tokens) - 1) // size]
        allocation = self.allocator.allocate(
            self.allocator.blocks_for(len(spec.tokens)),
            prefix=shareable,
        )
        if allocation is None:
            return None
        state = SequenceState(spec, list(spec.tokens), allocation, lookup.root)
        cached = allocation.cached_blocks * size
        state.reuse(cached, size, lookup.hashes)
        self._computing[spec.sequence_id] = state
        self._prefix_queries += len(spec.tokens)
        self._prefix_hits += cached
        self._events.append(
            Admitted(spec.sequence_id, allocation.blocks, allocation.cached_blocks, cached),
        )
        return state

    def _add_chunk(
        self,
        chunks: list[tuple[SequenceState, int]],
        state: SequenceState,
        budget: int,
    ) -> int:
        size = chunk_size(state.remaining, budget, self.allocator.block_size)
        if size > 0:
            chunks.append((state, size))
        return size
