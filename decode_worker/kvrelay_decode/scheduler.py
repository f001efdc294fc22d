"""Continuous batching on the decode worker: leases, local prefill, preemption. No torch, no clock."""

from collections import deque
from dataclasses import dataclass

from kvrelay_engine.batch import Batch, StepResult, TokenLogprobs
from kvrelay_engine.cache.allocator import Allocation, BlockAllocator
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
class Reserved:
    """Blocks are promised to a transfer; the first `first_block` of them hold valid KV already."""

    sequence_id: int
    blocks: tuple[int, ...]
    first_block: int
    generation: int


@dataclass(frozen=True, slots=True)
class LocalPrefillStarted:
    """A prompt that is computed here has its blocks. Not repeated after a preemption."""

    sequence_id: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokenSampled:
    """One output token; `index` counts over all attempts of the request."""

    sequence_id: int
    index: int
    token: int
    finish: FinishReason | None
    logprobs: TokenLogprobs | None = None
    """None where the request did not ask."""


DecodeEvent = Reserved | LocalPrefillStarted | TokenSampled | SequenceFailed


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A sequence without blocks: it wants a lease, or its tokens computed here."""

    spec: SequenceSpec
    tokens: tuple[int, ...]
    lookup: PrefixLookup
    """Of `tokens`; hashed once, since the head of the line is looked at in every step."""
    wants_lease: bool
    announced: bool = False


@dataclass(frozen=True, slots=True)
class _Leased:
    spec: SequenceSpec
    allocation: Allocation
    lookup: PrefixLookup


class DecodeScheduler:
    """Owner of the allocator and of every sequence's blocks.

    ```
    reserve ──► waiting ──► leased ──start──► running ──► finished
    submit  ──► waiting ────────────────────►   │
                   ▲                            │ (prompt chunks, then one token a step)
                   └────────── preempted ───────┘
    ```

    Blocks are given in arrival order, preempted sequences first. A running sequence that finds no
    block takes it from the one admitted last, which computes its tokens again later.
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
        self._leased: dict[int, _Leased] = {}
        self._running: dict[int, SequenceState] = {}
        self._events: list[DecodeEvent] = []
        self._preemptions = 0
        self._prefix_queries = 0
        self._prefix_hits = 0

    def reserve(self, spec: SequenceSpec) -> None:
        """Promise blocks to a transfer as soon as they are at hand; answered by `Reserved`."""
        self._waiting.append(self._wait(spec, spec.tokens, wants_lease=True))

    def submit(self, spec: SequenceSpec) -> None:
        """Compute the prompt here."""
        self._waiting.append(self._wait(spec, spec.tokens, wants_lease=False))

    def start(self, sequence_id: int, first_token: int) -> None:
        """The transfer is complete and verified: the sequence joins the next step."""
        leased = self._leased.pop(sequence_id)
        spec, size = leased.spec, self.allocator.block_size
        self.allocator.activate(leased.allocation.blocks)
        state = SequenceState(
            spec, [*spec.tokens, first_token], leased.allocation, leased.lookup.root
        )
        state.reuse(leased.allocation.cached_blocks * size, size, leased.lookup.hashes)
        state.advance(len(spec.tokens) - state.computed, self.allocator)
        self._running[sequence_id] = state

    def abort(self, sequence_id: int) -> None:
        """Let go of a sequence wherever it is. Idempotent.

        A leased one only after its transfer's cancel is confirmed: its blocks are reused at once.
        """
        state = self._running.pop(sequence_id, None)
        if state is not None:
            state.free(self.allocator)
            return
        leased = self._leased.pop(sequence_id, None)
        if leased is not None:
            self.allocator.release(leased.allocation.blocks)
            return
        self._waiting = deque(w for w in self._waiting if w.spec.sequence_id != sequence_id)

    def schedule(self) -> Batch | None:
        """One token for every running sequence, then prompt chunks with what is left of the budget."""
        self._grow()
        self._admit()
        budget = self._max_batch_tokens
        chunks: list[tuple[SequenceState, int]] = []
        prompts: list[SequenceState] = []
        for state in self._running.values():
            if state.remaining == 1:
                chunks.append((state, 1))
            else:
                prompts.append(state)
        for state in prompts:
            size = chunk_size(state.remaining, budget, self.allocator.block_size)
            if size > 0:
                chunks.append((state, size))
                budget -= size
        if not chunks:
            return None
        return Batch(tuple(state.slice(size) for state, size in chunks))

    def commit(self, batch: Batch, result: StepResult) -> None:
        """The step is done: append the sampled tokens, publish full blocks, free what is finished."""
        for part in batch.slices:
            state = self._running[part.sequence_id]
            error = result.errors.get(part.sequence_id)
            if error is not None:
                state.distrust(self.allocator)
                self.abort(part.sequence_id)
                self._events.append(SequenceFailed(part.sequence_id, error))
                continue
            state.advance(len(part.tokens), self.allocator)
            if part.sampling is None:
                continue
            token = result.tokens[part.sequence_id]
            state.append(token)
            finish = state.spec.finish_reason(token, state.generated)
            index = state.spec.output_offset + state.generated - 1
            logprobs = result.logprobs.get(part.sequence_id)
            self._events.append(TokenSampled(part.sequence_id, index, token, finish, logprobs))
            if finish is not None:
                self.abort(part.sequence_id)

    def take_events(self) -> list[DecodeEvent]:
        events, self._events = self._events, []
        return events

    @property
    def backlog_tokens(self) -> int:
        """Prompt tokens still to be computed here."""
        prompts = sum(s.remaining for s in self._running.values() if s.remaining > 1)
        return prompts + sum(len(w.tokens) for w in self._waiting if not w.wants_lease)

    def load(self) -> LoadSnapshot:
        counts = self.allocator.counts
        return LoadSnapshot(
            running=len(self._running),
            waiting=len(self._waiting),
            total_blocks=counts.total,
            free_blocks=counts.free,
            cached_blocks=counts.cached,
            leased_blocks=counts.leased,
            used_blocks=counts.in_use,
            backlog_tokens=self.backlog_tokens,
            preemptions=self._preemptions,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
        )

    def check_integrity(self) -> None:
        """No block without an owner, and none left over when nothing runs."""
        self.allocator.check_integrity()
        if not self._running and not self._leased:
            counts = self.allocator.counts
            assert counts.free + counts.cached == counts.total, counts  # noqa: S101 - own invariant

    def _grow(self) -> None:
        """Give every running sequence the block its next positions need, oldest first."""
        size = self.allocator.block_size
        for state in list(self._running.values()):
            if len(state.tokens) <= len(state.blocks) * size:
                continue  # the usual case, in every step but one a block
            if state.spec.sequence_id not in self._running:
                continue  # preempted below for an older one
            while self.allocator.blocks_for(len(state.tokens)) > len(state.blocks):
                block = self.allocator.extend()
                if block is not None:
                    state.blocks.append(block)
                elif self._preempt() is state:
                    break

    def _preempt(self) -> SequenceState:
        """Take the blocks of the sequence admitted last; it goes first when blocks are back."""
        _, state = self._running.popitem()
        state.free(self.allocator)
        self._preemptions += 1
        self._waiting.appendleft(
            self._wait(state.spec, tuple(state.tokens), wants_lease=False, announced=True),
        )
        return state

    def _wait(
        self,
        spec: SequenceSpec,
        tokens: tuple[int, ...],
        *,
        wants_lease: bool,
        announced: bool = False,
    ) -> _Waiting:
        lookup = look_up(tokens, self.allocator.block_size, self._fingerprint, spec.cache_salt)
        return _Waiting(spec, tokens, lookup, wants_lease, announced)

    def _admit(self) -> None:
        while self._waiting and len(self._running) + len(self._leased) < self._max_sequences:
            head = self._waiting[0]
            allocation = self._allocate(head)
            if allocation is None:
                return
            self._waiting.popleft()
            if head.wants_lease:
                self._lease(head, allocation)
            else:
                self._begin_local(head, allocation)

    def _allocate(self, head: _Waiting) -> Allocation | None:
        size = self.allocator.block_size
        # The block of the next token is part of the promise, so that a start never preempts.
        blocks = self.allocator.blocks_for(len(head.tokens) + 1)
        # One block each for those already running: admitting on the last block preempts at once.
        if self._running and self.allocator.available < blocks + len(self._running):
            return None
        full = len(head.tokens) if head.wants_lease else len(head.tokens) - 1
        return self.allocator.allocate(
            blocks,
            prefix=head.lookup.hashes[: full // size],
            leased=head.wants_lease,
        )

    def _lease(self, head: _Waiting, allocation: Allocation) -> None:
        spec = head.spec
        self._leased[spec.sequence_id] = _Leased(spec, allocation, head.lookup)
        self._events.append(
            Reserved(
                spec.sequence_id,
                allocation.blocks,
                allocation.cached_blocks,
                allocation.generation,
            ),
        )

    def _begin_local(self, head: _Waiting, allocation: Allocation) -> None:
        size = self.allocator.block_size
        state = SequenceState(head.spec, list(head.tokens), allocation, head.lookup.root)
        cached = allocation.cached_blocks * size
        state.reuse(cached, size, head.lookup.hashes)
        self._running[head.spec.sequence_id] = state
        if not head.announced:
            self._prefix_queries += len(head.tokens)
            self._prefix_hits += cached
            self._events.append(LocalPrefillStarted(head.spec.sequence_id, cached))
