"""The lease machines against each other: whatever is lost, the blocks arrive once and nothing is left."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay_transfer.frames import HEADER_SIZE
from kvrelay_transfer.layout import KvLayout, Piece
from kvrelay_transfer.lease import (
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

LAYOUT = KvLayout("m", "float32", 4, num_layers=3, num_kv_heads=1, head_dim=2)
BLOCK_BYTES = LAYOUT.layer_block_bytes
IDENTITY = LeaseId(b"l" * 16, 1, 1)


def lease(*, blocks_per_message=100, first_block=0):
    return OpenLease(IDENTITY, 5, b"a", first_block, HEADER_SIZE + blocks_per_message * BLOCK_BYTES)


def drain(sender):
    messages = []
    while (message := sender.next()) is not None:
        messages.append(message)
    sender.idle()
    return messages


def test_nothing_is_sent_before_the_lease_is_open():
    sender = SendLease(LAYOUT)
    sender.ready(Piece(0, 3, 0, 2))
    sender.computed()
    assert drain(sender) == []
    assert sender.state is SendState.COMPUTING
    sender.open(lease())
    assert drain(sender) == [KvMessage(0, Piece(0, 3, 0, 2)), HandoverMessage(1)]
    assert sender.state is SendState.SENT


def test_layer_groups_leave_while_later_layers_are_computed():
    sender = SendLease(LAYOUT)
    sender.open(lease())
    sender.ready(Piece(0, 1, 0, 2))
    assert drain(sender) == [KvMessage(0, Piece(0, 1, 0, 2))]
    sender.ready(Piece(1, 1, 0, 2))
    sender.ready(Piece(2, 1, 0, 2))
    sender.computed()
    assert drain(sender) == [KvMessage(1, Piece(1, 2, 0, 2)), HandoverMessage(2)]


def test_blocks_the_receiver_has_are_not_sent():
    sender = SendLease(LAYOUT)
    sender.ready(Piece(0, 3, 0, 2))
    sender.ready(Piece(0, 3, 2, 3))
    sender.computed()
    sender.open(lease(first_block=3))
    assert drain(sender) == [KvMessage(0, Piece(0, 3, 3, 2)), HandoverMessage(1)]


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
        receiver.kv_message(0, 1)
    receiver.posted()
    assert receiver.handover(0) == Complete()
    with pytest.raises(RuntimeError, match="ready"):
        receiver.kv_message(0, 1)


@pytest.mark.parametrize("sizes", [[], [3, 2], [3, 4]])
def test_a_record_that_leaves_blocks_out_is_never_complete(sizes):
    receiver = ReceiveLease(IDENTITY, owed=6)
    receiver.posted()
    for number, size in enumerate(sizes):
        receiver.kv_message(number, size)
    assert isinstance(receiver.handover(len(sizes)), Abandon)
    assert receiver.state is ReceiveState.RECEIVING


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
    sender, receiver = SendLease(LAYOUT), ReceiveLease(IDENTITY, 3 * (total_blocks - first_block))
    sender.open(lease(blocks_per_message=per_message, first_block=first_block))
    receiver.posted()
    wire, arrived, position, start = deque(), {}, 0, 0
    for count in chunks:
        for layer in range(3):
            sender.ready(Piece(layer, 1, start, count))
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
                verdict = receiver.corrupt()
            elif isinstance(message, HandoverMessage):
                verdict = receiver.handover(message.total)
            else:
                arrived[message.number] = message.piece
                size = message.piece.layer_count * message.piece.block_count
                verdict = receiver.kv_message(message.number, size)
        if isinstance(verdict, Missing):
            sender.resend(list(verdict.numbers))
            wire += drain(sender)
    if isinstance(verdict, Abandon):
        assert receiver.resends > MAX_RESENDS
        return
    assert not wire, "a message is left over for the next transfer"
    assert receiver.state is ReceiveState.READY
    cells = [
        (layer, block)
        for piece in arrived.values()
        for layer in range(piece.layer_start, piece.layer_start + piece.layer_count)
        for block in range(piece.block_first, piece.block_first + piece.block_count)
    ]
    assert sorted(cells) == [(la, b) for la in range(3) for b in range(first_block, total_blocks)]
