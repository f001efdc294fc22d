"""Which block belongs to whom: indices only, no tensors, one owner thread.

Every block is in exactly one state:

```
            allocate                 publish + release
   FREE ───────────────► IN_USE ◄─────────────────────► CACHED
     ▲  ▲                  ▲  │         match              │
     │  │ release          │  │ release (unpublished)      │ evict (LRU)
     │  └──────────────────┼──┘                            │
     │     allocate(leased)▼   activate                    │
     ├───────────────── LEASED                             │
     └─────────────────────────────────────────────────────┘
```

LEASED blocks are promised to a transfer that has not arrived; nothing but that transfer touches them.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


class BlockState(IntEnum):
    """The one state of a block."""

    FREE = 0
    CACHED = 1
    LEASED = 2
    IN_USE = 3


@dataclass(frozen=True, slots=True)
class Allocation:
    """Blocks of one sequence, in logical order. A handle: giving it to `release` ends the ownership."""

    blocks: tuple[int, ...]
    cached_blocks: int
    """The first this many held valid KV when they were taken."""
    generation: int
    """Rises with every allocation; a reference with an older one is stale."""


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """How many blocks are in each state; the four add up to the pool's size."""

    free: int
    cached: int
    leased: int
    in_use: int

    @property
    def total(self) -> int:
        return self.free + self.cached + self.leased + self.in_use


class IntegrityError(AssertionError):
    """A block is in no state or in two: a defect of ours, never the user's."""


class BlockAllocator:
    """Block states, reference counts and the prefix index of one KV pool. Not thread-safe."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._state = [BlockState.FREE] * num_blocks
        self._references = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._by_hash: dict[bytes, int] = {}
        self._leased = 0
        self._generation = 0

    @property
    def available(self) -> int:
        """Blocks an allocation may take: free ones and, by evicting, cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def counts(self) -> BlockCounts:
        free, cached = len(self._free), len(self._cached)
        in_use = self.num_blocks - free - cached - self._leased
        return BlockCounts(free, cached, self._leased, in_use)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of a prompt are at hand (cached, or in use by another sequence)."""
        for index, block_hash in enumerate(hashes):
            if block_hash not in self._by_hash:
                return index
        return len(hashes)

    def allocate(
        self,
        num_blocks: int,
        *,
        prefix: Sequence[bytes] = (),
        leased: bool = False,
    ) -> Allocation | None:
        """Take `num_blocks`: shared ones for the prefix that is at hand, fresh ones for the rest.

        Args:
            num_blocks: blocks in all, shared ones included.
            prefix: hashes of the leading full blocks that may be shared; at most `num_blocks`.
            leased: fresh blocks become LEASED instead of IN_USE.

        Returns:
            None, with nothing taken, when there are not enough free and cached blocks.
        """
        hits = self.match(prefix[:num_blocks])
        shared = [self._by_hash[block_hash] for block_hash in prefix[:hits]]
        evictable_hits = sum(1 for block in shared if self._state[block] is BlockState.CACHED)
        if num_blocks - hits > self.available - evictable_hits:
            return None
        for block in shared:
            self._share(block)
        state = BlockState.LEASED if leased else BlockState.IN_USE
        fresh = [self._take(state) for _ in range(num_blocks - hits)]
        self._generation += 1
        return Allocation((*shared, *fresh), hits, self._generation)

    def extend(self) -> int | None:
        """One more block for a running sequence, or None when the pool is exhausted."""
        return self._take(BlockState.IN_USE) if self.available else None

    def activate(self, blocks: Iterable[int]) -> None:
        """The transfer arrived and was verified: LEASED blocks become IN_USE."""
        for block in blocks:
            if self._state[block] is BlockState.LEASED:
                self._state[block] = BlockState.IN_USE
                self._leased -= 1

    def publish(self, block: int, block_hash: bytes) -> None:
        """Enter a full block, whose KV is written, into the prefix index.

        A block with the same content that is already indexed stays the indexed one.
        """
        if self._state[block] is not BlockState.IN_USE:
            raise IntegrityError(f"block {block} is {self._state[block].name}, cannot be published")
        if self._hash[block] is None and block_hash not in self._by_hash:
            self._hash[block] = block_hash
            self._by_hash[block_hash] = block

    def forget(self, blocks: Iterable[int]) -> None:
        """Take blocks in use out of the prefix index; they will be free, not cached, when released."""
        for block in blocks:
            if self._state[block] is not BlockState.IN_USE:
                raise IntegrityError(f"block {block} is {self._state[block].name}, nobody uses it")
            block_hash = self._hash[block]
            if block_hash is not None:
                del self._by_hash[block_hash]
                self._hash[block] = None

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each block; the last blocks are evicted first later on."""
        for block in reversed(blocks):
            if self._references[block] <= 0:
                raise IntegrityError(f"block {block} was released twice")
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._state[block] is BlockState.LEASED:
                self._leased -= 1
            if self._hash[block] is None:
                self._state[block] = BlockState.FREE
                self._free.append(block)
            else:
                self._state[block] = BlockState.CACHED
                self._cached[block] = None

    def clear(self) -> None:
        """Forget every cached block, and what it held: all that nobody uses is free."""
        for block in self._cached:
            self._unindex(block)
            self._state[block] = BlockState.FREE
        self._free.extend(self._cached)
        self._cached.clear()

    def check_integrity(self) -> None:
        """Every block in exactly one state, counts and index in agreement.

        Raises:
            IntegrityError: naming the first disagreement.
        """
        states = Counter(self._state)
        if len(set(self._free)) != len(self._free):
            raise IntegrityError("a block is twice in the free list")
        if states[BlockState.FREE] != len(self._free):
            raise IntegrityError(
                f"{states[BlockState.FREE]} FREE, {len(self._free)} in the free list"
            )
        if states[BlockState.CACHED] != len(self._cached):
            raise IntegrityError(
                f"{states[BlockState.CACHED]} CACHED, {len(self._cached)} in the LRU"
            )
        if states[BlockState.LEASED] != self._leased:
            raise IntegrityError(f"{states[BlockState.LEASED]} LEASED, {self._leased} counted")
        for block, state in enumerate(self._state):
            owned = state in (BlockState.LEASED, BlockState.IN_USE)
            if owned != (self._references[block] > 0):
                raise IntegrityError(
                    f"block {block} is {state.name} with {self._references[block]} references",
                )
            block_hash = self._hash[block]
            if block_hash is not None and self._by_hash.get(block_hash) != block:
                raise IntegrityError(f"block {block} has a hash the index does not know")
            if state is BlockState.FREE and block_hash is not None:
                raise IntegrityError(f"free block {block} is still indexed")
        if len(self._by_hash) != sum(h is not None for h in self._hash):
            raise IntegrityError("the index names blocks that have no hash")

    def _share(self, block: int) -> None:
        self._references[block] += 1
        if self._state[block] is BlockState.CACHED:
            del self._cached[block]
            self._state[block] = BlockState.IN_USE

    def _take(self, state: BlockState) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unindex(block)
        self._references[block] = 1
        self._state[block] = state
        if state is BlockState.LEASED:
            self._leased += 1
        return block

    def _unindex(self, block: int) -> None:
        """Nobody finds what a cached block holds any more."""
        known = self._hash[block]
        assert known is not None  # noqa: S101 - CACHED implies a hash
        del self._by_hash[known]
        self._hash[block] = None
