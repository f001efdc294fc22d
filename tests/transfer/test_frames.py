import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay_protocol.errors import CorruptFrame, LeaseLost, StaleFrame
from kvrelay_protocol.trace import TraceContext
from kvrelay_transfer.frames import (
    HEADER_SIZE,
    Expected,
    FrameHeader,
    FrameKind,
    open_frame,
    seal,
)
from kvrelay_transfer.ticket import frame_key, new_ticket

LEASE = bytes(range(16))
TICKET = bytes(range(32))
PROMPT = {"model": "m", "salt": b"tenant", "tokens": (5, 6, 7)}
KEY = frame_key(TICKET, **PROMPT)  # type: ignore[arg-type]
OURS = Expected(LEASE, 7, 3, KEY)
U8, U16 = st.integers(0, 255), st.integers(0, 2**16 - 1)
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
TRACES = st.builds(
    TraceContext,
    st.binary(min_size=16, max_size=16).filter(any),
    st.binary(min_size=8, max_size=8).filter(any),
    st.integers(0, 255),
)
HEADERS = st.builds(
    FrameHeader,
    kind=st.sampled_from(FrameKind),
    lease_id=st.binary(min_size=16, max_size=16),
    epoch=U64,
    generation=U32,
    sequence=U32,
    layer_start=U16,
    layer_count=U16,
    token_start=U32,
    token_count=U32,
    head_start=U16,
    head_count=U16,
    block_tokens=U16,
    dtype_code=U8,
    total_messages=U32,
    trace=st.none() | TRACES,
)


def sealed(header: FrameHeader, payload: bytes, spare: int = 0) -> bytearray:
    buffer = bytearray(HEADER_SIZE) + payload + bytes(spare)
    seal(buffer, header, len(payload), KEY)
    return buffer


def expected(header: FrameHeader) -> Expected:
    return Expected(header.lease_id, header.epoch, header.generation, KEY)


def some_header(**changes: object) -> FrameHeader:
    return FrameHeader(FrameKind.KV_GROUP, LEASE, 7, 3, 0, **changes)  # type: ignore[arg-type]


@given(HEADERS, st.binary(max_size=300), st.integers(0, 50))
def test_a_frame_is_read_as_it_was_written(header: FrameHeader, payload: bytes, spare: int):
    buffer = sealed(header, payload, spare)
    frame = open_frame(buffer, HEADER_SIZE + len(payload), expected(header))
    assert frame.header == header
    assert frame.payload == payload


@given(HEADERS, st.binary(max_size=40))
@settings(max_examples=15, deadline=None)
def test_every_flipped_bit_is_damage_that_is_asked_for_again(header: FrameHeader, payload: bytes):
    buffer, ours = sealed(header, payload), expected(header)
    for bit in range(len(buffer) * 8):
        buffer[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptFrame):
            open_frame(buffer, len(buffer), ours)
        buffer[bit // 8] ^= 1 << bit % 8
    open_frame(buffer, len(buffer), ours)


@given(HEADERS, st.binary(max_size=200))
@settings(max_examples=15, deadline=None)
def test_every_truncation_is_detected(header: FrameHeader, payload: bytes):
    buffer, ours = sealed(header, payload), expected(header)
    for nbytes in range(len(buffer)):
        with pytest.raises(CorruptFrame):
            open_frame(buffer, nbytes, ours)
        with pytest.raises(CorruptFrame):
            open_frame(buffer[:nbytes], nbytes, ours)
    with pytest.raises(CorruptFrame):
        open_frame(buffer, len(buffer) + 1, ours)
    with pytest.raises(CorruptFrame):
        open_frame(buffer + b"\0", len(buffer) + 1, ours)


@given(st.binary(max_size=400))
def test_noise_is_corrupt(noise: bytes):
    with pytest.raises(CorruptFrame):
        open_frame(noise, len(noise), OURS)


def test_a_large_payload_with_one_wrong_bit_is_detected():
    buffer = sealed(some_header(), bytes(3_000_000))
    buffer[2_000_001] ^= 4
    with pytest.raises(CorruptFrame, match="digest"):
        open_frame(buffer, len(buffer), OURS)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Expected(bytes(16), 7, 3, KEY), f"lease {LEASE.hex()}, expected {bytes(16).hex()}"),
        (Expected(LEASE, 8, 3, KEY), "epoch 0x7, expected 0x8"),
        (Expected(LEASE, 7, 4, KEY), "allocation 3, expected 4"),
    ],
)
def test_a_frame_of_another_lease_epoch_or_allocation_is_stale(other: Expected, words: str):
    buffer = sealed(some_header(), b"payload")
    assert open_frame(buffer, len(buffer), OURS).payload == b"payload"
    with pytest.raises(StaleFrame, match=words):
        open_frame(buffer, len(buffer), other)


@pytest.mark.parametrize(
    "change",
    [
        {"salt": b"tenan"},
        {"salt": b""},
        {"tokens": (5, 6, 8)},
        {"tokens": (5, 6)},
        {"tokens": (5, 6, 7, 0)},
        {"model": "n"},
        {"salt": b"tenantm", "model": ""},
    ],
)
def test_a_frame_of_another_tenant_prompt_or_model_is_foreign(change):
    """Whatever its header says: a router that mixed two requests up gives both the same lease."""
    buffer = sealed(some_header(), b"payload")
    key = frame_key(TICKET, **(PROMPT | change))
    with pytest.raises(StaleFrame, match="another lease, tenant, model or prompt"):
        open_frame(buffer, len(buffer), Expected(LEASE, 7, 3, key))


def test_a_frame_made_without_the_ticket_is_foreign():
    buffer = sealed(some_header(), b"payload")
    key = frame_key(new_ticket(), **PROMPT)
    with pytest.raises(StaleFrame, match="another lease"):
        open_frame(buffer, len(buffer), Expected(LEASE, 7, 3, key))


def test_a_lease_without_a_ticket_seals_nothing():
    with pytest.raises(LeaseLost, match="ticket of 0 bytes; it needs 32"):
        frame_key(b"", **PROMPT)


def test_a_key_stays_out_of_what_is_printed():
    assert KEY.hex() not in repr(OURS)
    assert repr(KEY) not in repr(OURS)


def test_corruption_is_found_before_staleness():
    buffer = sealed(some_header(), b"payload")
    buffer[9] ^= 1
    with pytest.raises(CorruptFrame):
        open_frame(buffer, len(buffer), Expected(bytes(16), 7, 3, KEY))


def test_the_bytes_to_send_are_header_and_payload_only():
    buffer = bytearray(HEADER_SIZE + 100)
    view = seal(buffer, some_header(), 60, KEY)
    assert len(view) == HEADER_SIZE + 60
    assert bytes(view[:4]) == b"KVRF"


@pytest.mark.parametrize(
    ("header", "payload_bytes"),
    [
        (some_header(), 41),
        (some_header(), -1),
        (some_header(layer_start=70_000), 0),
        (FrameHeader(FrameKind.HANDOVER, b"short", 7, 3, 0), 0),
    ],
)
def test_what_does_not_fit_is_refused(header: FrameHeader, payload_bytes: int):
    with pytest.raises(ValueError, match=r"fit|range|16 bytes"):
        seal(bytearray(HEADER_SIZE + 40), header, payload_bytes, KEY)


BLOCKS = bytes(range(100, 116))


def test_a_copiers_digest_seals_blocks_without_reading_them():
    buffer = bytearray(HEADER_SIZE) + b"payload"
    seal(buffer, some_header(), 7, KEY, BLOCKS)
    frame = open_frame(buffer, len(buffer), OURS)
    assert frame.blocks_digest == BLOCKS
    assert frame.payload == b"payload"
    plain = open_frame(sealed(some_header(), b"payload"), len(buffer), OURS)
    assert plain.blocks_digest is None


def test_every_flipped_bit_of_a_header_with_a_copiers_digest_is_detected():
    buffer = bytearray(HEADER_SIZE) + b"payload"
    seal(buffer, some_header(), 7, KEY, BLOCKS)
    for bit in range(HEADER_SIZE * 8):
        buffer[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptFrame):
            open_frame(buffer, len(buffer), OURS)
        buffer[bit // 8] ^= 1 << bit % 8


def test_only_blocks_may_be_left_for_their_copier_to_verify():
    buffer = bytearray(HEADER_SIZE) + b"payload"
    seal(buffer, FrameHeader(FrameKind.HANDOVER, LEASE, 7, 3, 0), 7, KEY, BLOCKS)
    with pytest.raises(CorruptFrame, match="digest"):
        open_frame(buffer, len(buffer), OURS)
    with pytest.raises(ValueError, match="16 bytes, not 3"):
        seal(buffer, some_header(), 7, KEY, b"abc")
