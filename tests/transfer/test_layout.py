from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_protocol.errors import LayoutMismatch
from kvrelay_transfer.layout import KvLayout, Piece, WireFormat, group_layers, split
from kvrelay_transfer.setup import layout_from_message, message_from_layout

LAYOUT = KvLayout("abc", "bfloat16", 16, 24, 2, 64)
WIRE = WireFormat.between(LAYOUT, LAYOUT)
LAYOUTS = st.builds(
    KvLayout,
    st.just("m"),
    st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]),
    st.sampled_from([1, 16, 32]),
    st.integers(1, 40),
    st.integers(1, 8),
    st.sampled_from([16, 64, 128]),
)


def test_bytes_of_a_block():
    assert LAYOUT.layer_block_bytes == 2 * 16 * 2 * 64 * 2
    assert LAYOUT.block_bytes == 24 * LAYOUT.layer_block_bytes


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int3"},
        {"block_size": 0},
        {"num_layers": -1},
        {"tensor_parallel": 3},
        {"tensor_rank": 1},
    ],
)
def test_an_impossible_layout_is_refused(wrong: dict[str, object]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(LAYOUT, **wrong)  # type: ignore[arg-type]


@given(LAYOUTS, st.integers(1, 300), st.integers(1, 2**24))
def test_a_group_is_near_its_target(layout: KvLayout, blocks: int, target: int):
    layers = group_layers(layout, blocks * layout.block_size, target)
    assert 1 <= layers <= layout.num_layers
    size = layers * blocks * layout.layer_block_bytes
    assert layers == 1 or size <= target
    assert layers == layout.num_layers or size + blocks * layout.layer_block_bytes > target


@given(
    LAYOUTS,
    LAYOUTS,
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.tuples(st.integers(0, 200), st.integers(0, 120)),
    st.integers(0, 31),
    st.integers(1, 64),
    st.integers(1, 2**23),
)
def test_every_layer_and_token_is_sent_once(
    sender: KvLayout, other: KvLayout, layer_pair, block_pair, rest: int, room: int, target: int
):
    receiver = replace(sender, block_size=other.block_size, dtype=other.dtype)
    wire = WireFormat.between(sender, receiver)
    layers = range(min(layer_pair[0], sender.num_layers), min(sum(layer_pair), sender.num_layers))
    size = sender.block_size
    tokens = range(block_pair[0] * size, sum(block_pair) * size + rest)
    limit = room * wire.layer_bytes(1)
    pieces = split(wire, layers, tokens, limit, target)
    sent = [
        (layer, piece) for piece in pieces for layer in range(piece.layer_start, piece.layer_end)
    ]
    for layer in layers:
        runs = [piece.tokens for number, piece in sent if number == layer]
        assert [token for run in runs for token in run] == list(tokens)
    assert all(piece.layer_count > 0 and piece.token_count > 0 for piece in pieces)
    assert all(piece.token_start % wire.block_tokens == 0 for piece in pieces)
    assert all(wire.payload_bytes(p) <= limit for p in pieces)
    assert [p.layer_start for p in pieces] == sorted(p.layer_start for p in pieces)


def test_a_message_that_holds_no_block_is_refused():
    with pytest.raises(ValueError, match="one block of one layer"):
        split(WIRE, range(24), range(64), LAYOUT.layer_block_bytes - 1)


def test_a_plan_reads_as_expected():
    per = LAYOUT.layer_block_bytes
    assert split(WIRE, range(4), range(32, 80), 6 * per, 6 * per) == [
        Piece(0, 2, 32, 48),
        Piece(2, 2, 32, 48),
    ]
    assert split(WIRE, range(2), range(77), 3 * per) == [
        Piece(0, 1, 0, 48),
        Piece(0, 1, 48, 29),
        Piece(1, 1, 0, 48),
        Piece(1, 1, 48, 29),
    ]


def test_blocks_that_are_alike_travel_as_they_are_and_others_token_by_token():
    assert (WIRE.block_tokens, WIRE.heads) == (16, range(2))
    assert WIRE.payload_bytes(Piece(0, 3, 16, 17)) == 3 * 2 * LAYOUT.layer_block_bytes
    for change in ({"block_size": 32}, {"dtype": "float32"}):
        receiver = replace(LAYOUT, **change)
        wire = WireFormat.between(LAYOUT, receiver)
        assert wire == WireFormat(receiver.dtype, 1, range(2), 64)
        assert wire.payload_bytes(Piece(0, 3, 16, 17)) == 3 * 17 * receiver.layer_token_bytes


def test_workers_that_share_heads_exchange_those_they_have_in_common():
    whole = replace(LAYOUT, num_kv_heads=8)
    halves = [replace(whole, tensor_parallel=2, tensor_rank=rank) for rank in range(2)]
    quarter = replace(whole, tensor_parallel=4, tensor_rank=1)
    assert [half.heads for half in halves] == [range(4), range(4, 8)]
    assert WireFormat.between(halves[1], whole).heads == range(4, 8)
    assert WireFormat.between(whole, halves[0]).heads == range(4)
    assert WireFormat.between(halves[0], quarter).heads == range(2, 4)
    assert WireFormat.between(halves[1], halves[1]).block_tokens == 16
    with pytest.raises(LayoutMismatch, match=r"heads 0 to 4, its peer 4 to 8"):
        WireFormat.between(halves[0], halves[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_fingerprint", "xyz"),
        ("num_layers", 25),
        ("num_kv_heads", 4),
        ("head_dim", 128),
        ("protocol_version", 1),
    ],
)
def test_what_must_be_equal_is_refused_with_both_values(field: str, value: object):
    other = replace(LAYOUT, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(LayoutMismatch) as refused:
        WireFormat.between(LAYOUT, other)
    words = (f"kv_layout.{field}", repr(getattr(LAYOUT, field)), repr(value))
    assert all(word in refused.value.message for word in words)


@given(LAYOUTS, st.integers(1, 4))
def test_a_manifest_survives_its_message(layout: KvLayout, parts: int):
    layout = replace(
        layout,
        num_kv_heads=layout.num_kv_heads * parts,
        tensor_parallel=parts,
        tensor_rank=parts - 1,
    )
    assert layout_from_message(message_from_layout(layout)) == layout


def test_a_manifest_that_no_blocks_can_have_is_refused():
    message = message_from_layout(LAYOUT)
    message.num_layers = 0
    with pytest.raises(LayoutMismatch, match="kv_layout: num_layers must be at least 1, not 0"):
        layout_from_message(message)
