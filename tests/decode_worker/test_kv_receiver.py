"""Frames of KV blocks as the receiver takes them: verified while they are copied, repeats left alone."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model

from kvrelay_decode.receiver import KvReceiver
from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.models.weights import load_model_config
from kvrelay_engine.sequence import SequenceSpec
from kvrelay_protocol.errors import CorruptFrame, StaleFrame
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_transfer.frames import HEADER_SIZE, FrameHeader, FrameKind, seal
from kvrelay_transfer.layout import DTYPE_CODES, KvLayout
from kvrelay_transfer.lease import LeaseId
from kvrelay_transfer.ticket import frame_key

BLOCK = 4
IDENTITY = LeaseId(bytes(16), 7, 3)
TICKET = bytes(32)
PROMPT = (11, 12, 13, 14, 15, 16, 17)
SPEC = SequenceSpec(1, "r", PROMPT, 0, 5, frozenset(), SamplingParams(), 60.0)
KEY = frame_key(TICKET, model="model", salt=b"", tokens=PROMPT)


def make_pool():
    config = load_model_config(tiny_model("llama3"))
    device = torch.device("cpu")
    return KVPool(config, num_blocks=6, block_size=BLOCK, device=device, dtype=torch.float32)


def make_receiver(pool):
    shape = pool.tensor.shape
    layout = KvLayout("model", "float32", BLOCK, shape[0], shape[4], shape[5])
    receiver = KvReceiver(
        IDENTITY,
        ticket=TICKET,
        tag=1,
        spec=SPEC,
        prompt_blocks=(4, 1),
        first_block=0,
        kit=SimpleNamespace(layout=layout),
        pool=pool,
        lease_s=10.0,
        deadline=time.monotonic() + 60,
        on_posted=lambda: None,
        on_missing=lambda numbers: None,
    )
    receiver.lease.posted()
    return receiver


def frame_of(pool, key=KEY, **changes):
    """All layers of two blocks, sealed with the digest that the gather took."""
    nbytes = pool.wire_bytes(0, pool.num_layers, 2)
    buffer = bytearray(HEADER_SIZE + nbytes)
    digest = pool.gather(0, pool.num_layers, [2, 5], memoryview(buffer)[HEADER_SIZE:], 3)
    header = FrameHeader(
        FrameKind.KV_GROUP, IDENTITY.lease_id, IDENTITY.epoch, IDENTITY.generation, 0,
        layer_count=pool.num_layers, token_count=len(PROMPT), head_count=len(pool.heads),
        block_tokens=BLOCK, dtype_code=DTYPE_CODES["float32"],
    )  # fmt: skip
    seal(buffer, replace(header, **changes), nbytes, key, digest)
    return buffer


@pytest.fixture
def source():
    pool = make_pool()
    torch.manual_seed(0)
    pool.tensor.normal_()
    return pool


def test_blocks_arrive_as_they_were_gathered(source):
    pool, buffer = make_pool(), frame_of(source)
    make_receiver(pool)._take(memoryview(buffer), len(buffer))
    assert torch.equal(pool.tensor[:, :, 4], source.tensor[:, :, 2])
    assert torch.equal(pool.tensor[:, :, 1, :3], source.tensor[:, :, 5, :3])
    assert not pool.tensor[:, :, 1, 3:].any()


@pytest.mark.parametrize("place", [HEADER_SIZE, HEADER_SIZE + 777, -1])
def test_a_flipped_bit_of_the_payload_is_found_by_the_copy(source, place):
    buffer = frame_of(source)
    buffer[place] ^= 16
    with pytest.raises(CorruptFrame, match="digest"):
        make_receiver(make_pool())._take(memoryview(buffer), len(buffer))


def test_a_damaged_repeat_is_not_written_over_verified_blocks(source):
    pool, buffer = make_pool(), frame_of(source)
    receiver = make_receiver(pool)
    receiver._take(memoryview(buffer), len(buffer))
    receiver.lease.kv_message(0, pool.num_layers * len(PROMPT))
    before = pool.tensor.clone()
    buffer[HEADER_SIZE + 100] ^= 1
    receiver._take(memoryview(buffer), len(buffer))
    assert torch.equal(pool.tensor, before)


def test_a_damaged_header_writes_nothing(source):
    pool, buffer = make_pool(), frame_of(source)
    buffer[48] ^= 1  # the first token
    with pytest.raises(CorruptFrame, match="header"):
        make_receiver(pool)._take(memoryview(buffer), len(buffer))
    assert not pool.tensor.any()


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_start": 1},
        {"token_start": 1},
        {"token_start": BLOCK},
        {"token_count": BLOCK},
        {"token_count": len(PROMPT) + 1},
        {"token_count": 0},
        {"head_start": 1},
        {"head_count": 1},
        {"head_count": 0},
        {"block_tokens": 2},
        {"block_tokens": 1},
        {"block_tokens": 0},
        {"dtype_code": DTYPE_CODES["bfloat16"]},
        {"dtype_code": 0},
    ],
)
def test_a_sealed_frame_that_does_not_fit_the_lease_writes_nothing(source, changes):
    pool, buffer = make_pool(), frame_of(source, **changes)
    with pytest.raises(StaleFrame, match="the lease is of float32, 3 layers, tokens 0 to 7 by 4"):
        make_receiver(pool)._take(memoryview(buffer), len(buffer))
    assert not pool.tensor.any()


@pytest.mark.parametrize(
    "other",
    [
        {"tokens": (*PROMPT[:-1], 18)},
        {"salt": b"another tenant"},
        {"model": "another model"},
    ],
)
def test_kv_of_another_prompt_tenant_or_model_writes_nothing(source, other):
    key = frame_key(TICKET, **({"model": "model", "salt": b"", "tokens": PROMPT} | other))
    pool, buffer = make_pool(), frame_of(source, key=key)
    with pytest.raises(StaleFrame, match="another lease, tenant, model or prompt"):
        make_receiver(pool)._take(memoryview(buffer), len(buffer))
    assert not pool.tensor.any()
