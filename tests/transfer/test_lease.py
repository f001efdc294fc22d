"""The lease machines against each other: whatever is lost, the blocks arrive once and nothing is left."""

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay_protocol.errors import LayoutMismatch
from kvrelay_transfer.frames import HEADER_SIZE
from kvrelay_transfer.layout import KvLayout, Piece
from kvrelay_transfer.lease import (
    MAX_QUIET_ASKS,
    MAX_REFUSED_FRAMES,
    MAX_RESENDS,
    Abandon,
    Complete,
    Continue,
    HandoverMessage,
    KvMessage,
    LeaseId,
    Missing,
    OpenLease,
    ReceiveLease,
    ReceiveState,
    SendLease,
    SendState,
)

BLOCK = 4
LAYOUT = KvLayout("m", "float32", BLOCK, num_layers=3, num_kv_heads=1, head_dim=2)
BLOCK_BYTES = LAYOUT.layer_block_bytes
IDENTITY = LeaseId(b"l" * 16, 1, 1)


def lease(*, blocks_per_message=100, first_block=0, layout=LAYOUT):
    room = HEADER_SIZE + blocks_per_message * BLOCK_BYTES
    return OpenLease(IDENTITY, 5, b"a", first_block, room, layout, bytes(32))


def blocks(layer_start, layer_count, first, count):
    """Whole blocks of the sender, as a piece."""
    return Piece(layer_start, layer_count, first * BLOCK, count * BLOCK)


def drain(sender):
    messages = []
    while (message := sender.next()) is not None:
        messages.append(message)
    sender.idle()
    return messages


def test_nothing_is_sent_before_the_lease_is_open():
    sender = SendLease(LAYOUT)
    sender.ready(blocks(0, 3, 0, 2))
    sender.computed()
    assert drain(sender) == []
    assert sender.state is SendState.COMPUTING
    sender.open(lease())
    assert drain(sender) == [KvMessage(0, blocks(0, 3, 0, 2)), HandoverMessage(1)]
    assert sender.state is SendState.SENT


def test_layer_groups_leave_while_later_layers_are_computed():
    sender = SendLease(LAYOUT)
    sender.open(lease())
    sender.ready(blocks(0, 1, 0, 2))
    assert drain(sender) == [KvMessage(0, blocks(0, 1, 0, 2))]
    sender.ready(blocks(1, 1, 0, 2))
    sender.ready(blocks(2, 1, 0, 2))
    sender.computed()
    assert drain(sender) == [KvMessage(1, blocks(1, 2, 0, 2)), HandoverMessage(2)]


def test_blocks_the_receiver_has_are_not_sent():
    sender = SendLease(LAYOUT)
    sender.ready(blocks(0, 3, 0, 2))
    sender.ready(blocks(0, 3, 2, 3))
    sender.computed()
    sender.open(lease(first_block=3))
    assert drain(sender) == [KvMessage(0, blocks(0, 3, 3, 2)), HandoverMessage(1)]


def test_a_prompt_that_ends_inside_a_block_ends_there_on_the_wire():
    sender = SendLease(LAYOUT)
    sender.ready(Piece(0, 3, 0, 6))
    sender.computed()
    sender.open(lease(first_block=1))
    assert drain(sender) == [KvMessage(0, Piece(0, 3, 4, 2)), HandoverMessage(1)]


@pytest.mark.parametrize(("block_size", "first_block", "first"), [(3, 2, 6), (8, 1, 8), (1, 7, 7)])
def test_a_receivers_own_blocks_say_where_to_begin(block_size, first_block, first):
    layout = replace(LAYOUT, block_size=block_size)
    sender = SendLease(LAYOUT)
    sender.ready(Piece(0, 3, 0, 4))
    sender.ready(Piece(0, 3, 4, 7))
    sender.computed()
    sender.open(lease(first_block=first_block, layout=layout))
    assert sender.wire.block_tokens == 1
    assert drain(sender) == [KvMessage(0, Piece(0, 3, first, 11 - first)), HandoverMessage(1)]


def test_a_lease_of_another_model_is_not_opened():
    sender = SendLease(LAYOUT)
    with pytest.raises(
        LayoutMismatch, match="model_fingerprint: this worker has 'm', its peer 'n'"
    ):
        sender.open(lease(layout=replace(LAYOUT, model_fingerprint="n")))
    assert sender.state is SendState.COMPUTING


def test_a_second_grant_and_a_late_resend_change_nothing():
    sender = SendLease(LAYOUT)
    sender.open(lease(first_block=1))
    sender.open(lease(first_block=0))
    assert sender.lease.first_block == 1
    sender.release()
    sender.resend([0])
    assert drain(sender) == []
    assert sender.state is SendState.RELEASED


def test_states_that_do_not_fit_are_refused():
    receiver = ReceiveLease(IDENTITY, owed=0)
    with pytest.raises(RuntimeError, match="reserved"):
        receiver.kv_message(0, Piece(0, 1, 0, 1))
    receiver.posted()
    assert receiver.handover(0) == Complete()
    with pytest.raises(RuntimeError, match="ready"):
        receiver.kv_message(0, Piece(0, 1, 0, 1))


def test_refused_frames_are_counted_apart_and_bounded_together():
    receiver = ReceiveLease(IDENTITY, owed=1)
    receiver.posted()
    for n in range(MAX_REFUSED_FRAMES):
        assert (receiver.corrupt() if n % 4 else receiver.foreign()) == Continue()
    assert (receiver.corrupt_frames, receiver.foreign_frames) == (48, 16)
    assert receiver.foreign() == Abandon("48 corrupt and 17 foreign frames")


@pytest.mark.parametrize("sizes", [[], [3, 2], [3, 4]])
def test_a_record_that_leaves_blocks_out_is_never_complete(sizes):
    receiver = ReceiveLease(IDENTITY, owed=6)
    receiver.posted()
    for number, size in enumerate(sizes):
        receiver.kv_message(number, Piece(number, 1, 0, size))
    assert isinstance(receiver.handover(len(sizes)), Abandon)
    assert receiver.state is ReceiveState.RECEIVING


@pytest.mark.parametrize(
    ("piece", "there"),
    [
        (Piece(0, 1, 0, 4), True),
        (Piece(1, 2, 3, 5), True),
        (Piece(0, 3, 0, 9), True),
        (Piece(1, 1, 2, 1), True),
        (Piece(2, 1, 0, 4), False),
        (Piece(0, 2, 4, 4), False),
        (Piece(2, 5, 4, 9), False),
    ],
)
def test_kv_that_came_under_another_number_is_recognised(piece, there):
    receiver = ReceiveLease(IDENTITY, owed=100)
    receiver.posted()
    receiver.kv_message(3, Piece(0, 2, 0, 4))
    assert receiver.overlaps(piece) is there


@settings(max_examples=300, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    per_message=st.integers(1, 9),
    first_block=st.integers(0, 3),
    corrupted=st.sets(st.integers(0, 60), max_size=6),
)
def test_every_block_arrives_once_or_the_transfer_is_abandoned(
    chunks,
    per_message,
    first_block,
    corrupted,
):
    """`corrupted` are positions in the order of arrival; the wire keeps that order."""
    total_blocks = sum(chunks)
    first_block = min(first_block, total_blocks)
    owed = 3 * BLOCK * (total_blocks - first_block)
    sender, receiver = SendLease(LAYOUT), ReceiveLease(IDENTITY, owed)
    sender.open(lease(blocks_per_message=per_message, first_block=first_block))
    receiver.posted()
    wire, arrived, position, start = deque(), {}, 0, 0
    for count in chunks:
        for layer in range(3):
            sender.ready(blocks(layer, 1, start, count))
            wire += drain(sender)
        start += count
    sender.computed()
    wire += drain(sender)
    verdict = Continue()
    while not isinstance(verdict, Complete | Abandon):
        if not wire:
            assert receiver.record_in_doubt, "silence without a reason"
            verdict = receiver.quiet()
        else:
            message = wire.popleft()
            position += 1
            if position - 1 in corrupted:
                verdict = receiver.corrupt() if position % 2 else receiver.foreign()
            elif isinstance(message, HandoverMessage):
                verdict = receiver.handover(message.total)
            else:
                arrived[message.number] = message.piece
                assert receiver.has(message.number) or not receiver.overlaps(message.piece)
                verdict = receiver.kv_message(message.number, message.piece)
        if isinstance(verdict, Missing):
            sender.resend(list(verdict.numbers))
            wire += drain(sender)
    if isinstance(verdict, Abandon):
        assert receiver.resends > MAX_RESENDS or receiver.quiet_asks > MAX_QUIET_ASKS
        return
    assert not wire, "a message is left over for the next transfer"
    assert receiver.state is ReceiveState.READY
    cells = [
        (layer, token)
        for piece in arrived.values()
        for layer in range(piece.layer_start, piece.layer_end)
        for token in piece.tokens
    ]
    tokens = range(first_block * BLOCK, total_blocks * BLOCK)
    assert sorted(cells) == [(layer, token) for layer in range(3) for token in tokens]


def test_records_that_were_under_way_already_cost_no_round_of_asking():
    """A slow link: the record was asked for twice before it came, so it comes three times."""
    receiver = ReceiveLease(IDENTITY, owed=3 * BLOCK)
    receiver.posted()
    receiver.corrupt()
    assert receiver.quiet() == Missing(())
    receiver.all_sent()
    assert receiver.quiet() == Missing(())
    assert receiver.handover(1) == Missing((0,))
    assert receiver.handover(1) == Continue()
    assert receiver.handover(1) == Continue()
    assert receiver.record_in_doubt, "what was asked for may be lost as well"
    receiver.kv_message(0, blocks(0, 3, 0, 1))
    assert receiver.handover(1) == Complete()
    assert (receiver.resends, receiver.quiet_asks) == (1, 2)


def test_what_is_asked_for_and_lost_again_is_asked_for_again():
    receiver = ReceiveLease(IDENTITY, owed=3 * BLOCK)
    receiver.posted()
    assert receiver.handover(1) == Missing((0,))
    assert receiver.handover(1) == Continue()  # the record behind it came, it did not
    assert receiver.quiet() == Missing(())
    assert receiver.handover(1) == Missing((0,))
    receiver.corrupt()  # there it was
    assert isinstance(receiver.handover(1), Abandon)
