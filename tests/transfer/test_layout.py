from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_transfer.layout import KvLayout, Piece, group_layers, split

LAYOUT = KvLayout("abc", "bfloat16", 16, 24, 2, 64)
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


@pytest.mark.parametrize("wrong", [{"dtype": "int3"}, {"block_size": 0}, {"num_layers": -1}])
def test_an_impossible_layout_is_refused(wrong: dict[str, object]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(LAYOUT, **wrong)  # type: ignore[arg-type]


@given(LAYOUTS, st.integers(1, 300), st.integers(1, 2**24))
def test_a_group_is_near_its_target(layout: KvLayout, blocks: int, target: int):
    layers = group_layers(layout, blocks, target)
    assert 1 <= layers <= layout.num_layers
    size = layers * blocks * layout.layer_block_bytes
    assert layers == 1 or size <= target
    assert layers == layout.num_layers or size + blocks * layout.layer_block_bytes > target


@given(
    LAYOUTS,
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.tuples(st.integers(0, 200), st.integers(0, 120)),
    st.integers(1, 64),
    st.integers(1, 2**23),
)
def test_every_layer_and_block_is_sent_once(
    layout: KvLayout, layer_pair, block_pair, room: int, target: int
):
    layers = range(min(layer_pair[0], layout.num_layers), min(sum(layer_pair), layout.num_layers))
    blocks = range(block_pair[0], sum(block_pair))
    limit = room * layout.layer_block_bytes
    pieces = split(layout, layers, blocks, limit, target)
    cells = [
        (layer, block)
        for p in pieces
        for layer in range(p.layer_start, p.layer_start + p.layer_count)
        for block in range(p.block_first, p.block_first + p.block_count)
    ]
    assert len(cells) == len(set(cells))
    assert set(cells) == {(layer, block) for layer in layers for block in blocks}
    assert all(p.payload_bytes(layout) <= limit for p in pieces)
    assert [p.layer_start for p in pieces] == sorted(p.layer_start for p in pieces)


def test_a_message_that_holds_no_block_is_refused():
    with pytest.raises(ValueError, match="one block of one layer"):
        split(LAYOUT, range(24), range(4), LAYOUT.layer_block_bytes - 1)


def test_a_plan_reads_as_expected():
    per = LAYOUT.layer_block_bytes
    assert split(LAYOUT, range(4), range(2, 5), 6 * per, 6 * per) == [
        Piece(0, 2, 2, 3),
        Piece(2, 2, 2, 3),
    ]
    assert split(LAYOUT, range(2), range(5), 3 * per) == [
        Piece(0, 1, 0, 3),
        Piece(0, 1, 3, 2),
        Piece(1, 1, 0, 3),
        Piece(1, 1, 3, 2),
    ]
