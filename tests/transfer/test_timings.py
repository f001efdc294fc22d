"""Notes of messages: bounded, and merged alike on both sides."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay_transfer.timings import MAX_NOTES, MessageNotes


def noted(numbers) -> MessageNotes[tuple[int, ...]]:
    notes: MessageNotes[tuple[int, ...]] = MessageNotes(lambda one, other: one + other)
    for number in numbers:
        notes.add(number, (number,))
    return notes


def test_few_messages_are_noted_one_by_one():
    assert noted(range(MAX_NOTES)).in_order == [(n,) for n in range(MAX_NOTES)]


def test_neighbours_are_merged_beyond():
    assert noted(range(MAX_NOTES + 1)).in_order == [
        *((n, n + 1) for n in range(0, MAX_NOTES, 2)),
        (MAX_NOTES,),
    ]


def test_a_repeat_is_merged_with_its_message():
    assert noted([0, 1, 0]).in_order == [(0, 0), (1,)]


@settings(deadline=None)
@given(st.integers(1, 300), st.randoms())
def test_whatever_the_order_both_sides_merge_the_same(count: int, rng):
    numbers = list(range(count))
    rng.shuffle(numbers)
    one, other = noted(range(count)).in_order, noted(numbers).in_order
    assert len(one) <= MAX_NOTES
    assert [set(note) for note in one] == [set(note) for note in other]
    assert sorted(n for note in one for n in note) == list(range(count))
