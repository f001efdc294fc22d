"""The receiving end of a Join stream: every message once, in order, or none any more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.incoming import Incoming, MessageMissing


def message(number: int) -> pb.RouterMessage:
    return pb.RouterMessage(cancel=pb.Cancel(sequence_id=number), number=number)


def read(numbers: list[int]) -> tuple[list[int], int, int | None]:
    """What was handled, how many repeats were dropped, and which number was missing."""
    incoming, handled, repeats = Incoming(), [], 0
    for number in numbers:
        try:
            fresh = incoming.take(message(number), lambda m: handled.append(m.cancel.sequence_id))
        except MessageMissing:
            return handled, repeats, len(handled) + 1
        repeats += not fresh
    return handled, repeats, None


def test_messages_in_order_are_handled() -> None:
    assert read([1, 2, 3]) == ([1, 2, 3], 0, None)


@pytest.mark.parametrize("numbers", [[1, 2, 2, 3], [1, 2, 1, 3], [0, 1, 2, 3]])
def test_a_repeat_and_what_has_no_number_are_dropped(numbers) -> None:
    assert read(numbers) == ([1, 2, 3], 1, None)


def test_a_gap_names_what_is_missing_and_what_came() -> None:
    incoming = Incoming()
    incoming.take(message(1), lambda _: None)
    with pytest.raises(MessageMissing, match=r"^message 2 is missing \(4 came\)$"):
        incoming.take(message(4), lambda _: pytest.fail("handled"))


@given(st.lists(st.sampled_from(["pass", "drop", "twice", "swap"]), min_size=1, max_size=30))
def test_whatever_happens_on_the_way_is_noticed_or_harmless(faults) -> None:
    line = list(range(1, len(faults) + 2))
    sent: list[int] = []
    for number, fault in zip(line, faults, strict=False):
        sent += {"pass": [number], "drop": [], "twice": [number] * 2, "swap": [-number]}[fault]
    for at, number in enumerate(sent):  # a swapped one comes after the next
        if number < 0:
            sent[at] = -number
            sent[at : at + 2] = reversed(sent[at : at + 2])
    handled, _, missing = read([abs(number) for number in [*sent, line[-1]]])
    assert handled == line[: len(handled)]
    assert missing is not None or handled == line


def test_a_message_whose_handling_fails_is_not_handled_again() -> None:
    incoming, handled = Incoming(), []

    def fail(part: pb.RouterMessage) -> None:
        handled.append(part.number)
        raise ValueError(part.number)

    with pytest.raises(ValueError, match="1"):
        incoming.take(message(1), fail)
    assert not incoming.take(message(1), fail)
    assert handled == [1]
