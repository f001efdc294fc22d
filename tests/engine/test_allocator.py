import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvrelay_engine.cache.allocator import BlockAllocator, BlockCounts, IntegrityError
from kvrelay_engine.cache.hashing import hash_full_blocks, root_hash

BLOCK = 4


def _hashes(tokens, salt=b""):
    return hash_full_blocks(tokens, BLOCK, root_hash("model", salt))


def _publish_all(allocator, allocation, hashes):
    for block, block_hash in zip(allocation.blocks, hashes, strict=False):
        allocator.publish(block, block_hash)


def test_a_hash_names_everything_before_it():
    one = _hashes([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert len(one) == 2
    assert _hashes([1, 2, 3, 4, 9, 9, 9, 9])[0] == one[0]
    assert _hashes([0, 2, 3, 4, 5, 6, 7, 8])[1] != one[1]
    assert _hashes([1, 2, 3, 4], salt=b"tenant")[0] != one[0]
    assert hash_full_blocks([1, 2, 3, 4], BLOCK, root_hash("other", b""))[0] != one[0]


def test_released_blocks_are_found_again_by_content():
    allocator = BlockAllocator(4, BLOCK)
    hashes = _hashes(range(8))
    first = allocator.allocate(3, prefix=hashes)
    _publish_all(allocator, first, hashes)
    allocator.release(first.blocks)
    assert allocator.counts == BlockCounts(free=2, cached=2, leased=0, in_use=0)
    second = allocator.allocate(3, prefix=hashes)
    assert second.cached_blocks == 2
    assert second.blocks[:2] == first.blocks[:2]
    assert second.generation > first.generation


def test_a_running_sequence_shares_its_published_blocks():
    allocator = BlockAllocator(3, BLOCK)
    hashes = _hashes(range(4))
    first = allocator.allocate(2, prefix=hashes)
    _publish_all(allocator, first, hashes)
    second = allocator.allocate(2, prefix=hashes)
    assert second.blocks[0] == first.blocks[0]
    allocator.release(first.blocks)
    assert allocator.counts.in_use == 2
    allocator.release(second.blocks)
    allocator.check_integrity()


def test_the_least_recently_released_block_is_evicted_first_and_tails_before_heads():
    allocator = BlockAllocator(4, BLOCK)
    old, new = _hashes(range(8)), _hashes(range(100, 108))
    for hashes in (old, new):
        allocation = allocator.allocate(2)
        _publish_all(allocator, allocation, hashes)
        allocator.release(allocation.blocks)
    allocator.allocate(1)
    assert allocator.match(old) == 1
    assert allocator.match(new) == 2


def test_nothing_is_taken_when_there_is_not_enough():
    allocator = BlockAllocator(2, BLOCK)
    hashes = _hashes(range(4))
    allocation = allocator.allocate(1)
    _publish_all(allocator, allocation, hashes)
    allocator.release(allocation.blocks)
    before = allocator.counts
    assert allocator.allocate(3, prefix=hashes) is None
    assert allocator.counts == before
    # A cached block that is shared can't be evicted for the same allocation.
    assert allocator.allocate(3, prefix=hashes) is None


def test_leased_blocks_become_used_only_when_activated():
    allocator = BlockAllocator(3, BLOCK)
    lease = allocator.allocate(2, leased=True)
    assert allocator.counts.leased == 2
    with pytest.raises(IntegrityError, match="LEASED"):
        allocator.publish(lease.blocks[0], b"x" * 16)
    allocator.activate(lease.blocks)
    assert allocator.counts == BlockCounts(free=1, cached=0, leased=0, in_use=2)
    allocator.release(lease.blocks)
    with pytest.raises(IntegrityError, match="released twice"):
        allocator.release(lease.blocks)


def test_forgotten_blocks_serve_their_users_and_are_found_by_nobody_else():
    allocator = BlockAllocator(4, BLOCK)
    hashes = _hashes(range(8))
    first = allocator.allocate(2)
    _publish_all(allocator, first, hashes)
    second = allocator.allocate(2, prefix=hashes)
    allocator.forget(first.blocks)
    assert allocator.match(hashes) == 0
    allocator.release(first.blocks)
    assert allocator.counts == BlockCounts(free=2, cached=0, leased=0, in_use=2)
    allocator.release(second.blocks)
    assert allocator.counts.free == 4
    with pytest.raises(IntegrityError, match="nobody uses it"):
        allocator.forget(first.blocks)


def test_an_inconsistency_is_noticed():
    allocator = BlockAllocator(2, BLOCK)
    allocator._free.pop()
    with pytest.raises(IntegrityError):
        allocator.check_integrity()


class AllocatorMachine(RuleBasedStateMachine):
    """Any order of operations keeps every block in exactly one state."""

    def __init__(self):
        super().__init__()
        self.allocator = BlockAllocator(7, 2)
        self.held: list[tuple[object, list[int], list[bytes], bool]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8), leased=st.booleans())
    def allocate(self, tokens, leased):
        hashes = hash_full_blocks(tokens, 2, b"root")
        blocks = self.allocator.blocks_for(len(tokens))
        available = self.allocator.available
        allocation = self.allocator.allocate(blocks, prefix=hashes, leased=leased)
        if allocation is None:
            assert available < blocks
            return
        assert len(set(allocation.blocks)) == blocks
        self.held.append((allocation, list(allocation.blocks), hashes, leased))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data):
        _allocation, blocks, hashes, leased = data.draw(st.sampled_from(self.held))
        if leased:
            self.allocator.activate(blocks)
        for block, block_hash in zip(blocks, hashes, strict=False):
            self.allocator.publish(block, block_hash)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def extend(self, data):
        block = self.allocator.extend()
        if block is not None:
            data.draw(st.sampled_from(self.held))[1].append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data):
        _allocation, blocks, _hashes, leased = data.draw(st.sampled_from(self.held))
        if leased:
            self.allocator.activate(blocks)
        self.allocator.forget(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.allocator.release(self.held.pop(index)[1])

    @invariant()
    def consistent(self):
        self.allocator.check_integrity()
        counts = self.allocator.counts
        assert counts.total == 7
        owned = {block for _, blocks, _, _ in self.held for block in blocks}
        assert counts.leased + counts.in_use == len(owned)

    def teardown(self):
        for _, blocks, _, _ in self.held:
            self.allocator.release(blocks)
        counts = self.allocator.counts
        assert counts.free + counts.cached == counts.total


AllocatorMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestAllocatorMachine = AllocatorMachine.TestCase
