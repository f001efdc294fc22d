"""Frames of KV blocks as the receiver takes them: verified while they are copied, repeats left alone."""

import asyncio
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
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import CorruptFrame, LeaseLost, StaleFrame
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_transfer.frames import HEADER_SIZE, FrameHeader, FrameKind, seal
from kvrelay_transfer.inproc import InprocTransport
from kvrelay_transfer.kit import TransferKit
from kvrelay_transfer.layout import DTYPE_CODES, KvLayout, Piece
from kvrelay_transfer.lease import MAX_QUIET_ASKS, LeaseId, ReceiveState
from kvrelay_transfer.staging import StagingBuffers
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
    receiver = new_receiver(pool, SimpleNamespace(layout=layout_of(pool)))
    receiver.lease.posted()
    return receiver


def layout_of(pool):
    shape = pool.tensor.shape
    return KvLayout("model", "float32", BLOCK, shape[0], shape[4], shape[5])


def new_receiver(pool, kit, lease_s=300.0):
    return KvReceiver(
        IDENTITY,
        ticket=TICKET,
        tag=1,
        spec=SPEC,
        prompt_blocks=(4, 1),
        first_block=0,
        kit=kit,
        pool=pool,
        lease_s=lease_s,
        deadline=time.monotonic() + 60,
        on_posted=lambda: None,
        on_missing=lambda numbers: None,
    )


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


def record_of(**fields):
    """The hand-over record behind one message of blocks."""
    payload = pb.Handover(first_token=42, **fields).SerializeToString()
    header = FrameHeader(
        FrameKind.HANDOVER, IDENTITY.lease_id, IDENTITY.epoch, IDENTITY.generation, 1,
        total_messages=2,
    )  # fmt: skip
    buffer = bytearray(HEADER_SIZE) + payload
    seal(buffer, header, len(payload), KEY)
    return buffer


@pytest.fixture
async def link():
    """The kit of a receiver, and a transport that sends to it."""
    pool, here, there = make_pool(), InprocTransport(), InprocTransport()
    await here.start()
    await there.start()
    kit = TransferKit(here, StagingBuffers(2, 1 << 16), layout_of(pool))
    yield pool, kit, there
    assert kit.staging.held == 0
    await kit.close()
    await there.close()


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


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
    receiver.lease.kv_message(0, Piece(0, pool.num_layers, 0, len(PROMPT)))
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


async def test_a_lease_nobody_renews_waits_and_one_renewed_once_has_an_end(link):
    pool, kit, _ = link
    receiver = new_receiver(pool, kit, lease_s=0.02)
    running = asyncio.create_task(receiver.run())
    await asyncio.sleep(0.1)
    assert not running.done()
    receiver.renew()
    with pytest.raises(LeaseLost, match=r"no KV block came for 0\.02 s"):
        await running
    assert receiver.lease.state is ReceiveState.EXPIRED


async def test_every_renewal_moves_the_end_of_a_lease_nothing_came_for(link):
    pool, kit, _ = link
    receiver = new_receiver(pool, kit, lease_s=60.0)
    running = asyncio.create_task(receiver.run())
    await until(lambda: receiver._waiting)
    ends = [receiver._waiting.when()]
    for _ in range(3):
        receiver.renew()
        ends.append(receiver._waiting.when())
        await asyncio.sleep(0.002)
    assert ends[0] is None
    assert ends[1] < ends[2] < ends[3]
    running.cancel()
    await asyncio.wait([running])


async def test_a_renewal_before_the_grant_counts_from_the_grant(link):
    pool, kit, _ = link
    with kit.staging.try_acquire(), kit.staging.try_acquire():
        receiver = new_receiver(pool, kit, lease_s=60.0)
        running = asyncio.create_task(receiver.run())
        await asyncio.sleep(0)
        receiver.renew()
    before = asyncio.get_running_loop().time()
    await until(lambda: receiver._waiting)
    assert receiver._waiting.when() >= before + 60.0
    running.cancel()
    await asyncio.wait([running])


async def test_once_a_message_came_only_messages_renew(link, source):
    pool, kit, there = link
    receiver = new_receiver(pool, kit, lease_s=0.05)
    running = asyncio.create_task(receiver.run())
    await until(lambda: receiver.lease.state is ReceiveState.RECEIVING)
    await there.send(kit.transport.address, 1, frame_of(source))
    await until(lambda: receiver.lease.has(0))

    async def insist():
        while True:
            receiver.renew()
            await asyncio.sleep(0.001)

    insisting = asyncio.create_task(insist())
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(running, 30)
    insisting.cancel()


@pytest.mark.parametrize("key", ["other", "own, damaged"])
async def test_refused_frames_end_in_a_typed_error_that_says_why(link, source, key):
    """A sender that mixed two prompts up, asked again, mixes them up again; or a link that damages all."""
    pool, kit, there = link
    receiver = new_receiver(pool, kit)
    asked = []
    receiver._on_missing = asked.append
    running = asyncio.create_task(receiver.run())
    await until(lambda: receiver.lease.state is ReceiveState.RECEIVING)
    other = frame_key(TICKET, model="model", salt=b"", tokens=(*PROMPT[:-1], 99))
    bad = frame_of(source, key=other if key == "other" else KEY)
    bad[-1] ^= key != "other"
    for sent in range(1, MAX_QUIET_ASKS + 2):
        await there.send(kit.transport.address, 1, bad)
        await until(lambda sent=sent: len(asked) == sent or running.done())
    error, cause, counts = {
        "other": (StaleFrame, "another lease, tenant, model or prompt", (MAX_QUIET_ASKS + 1, 0)),
        "own, damaged": (CorruptFrame, "does not hold", (0, MAX_QUIET_ASKS + 1)),
    }[key]
    with pytest.raises(error, match="given up: no record came, asked for 4 times") as refused:
        await running
    assert cause in str(refused.value.__cause__)
    assert (receiver.lease.foreign_frames, receiver.lease.corrupt_frames) == counts


async def test_a_foreign_frame_does_not_disturb_a_transfer(link, source):
    pool, kit, there = link
    receiver = new_receiver(pool, kit)
    running = asyncio.create_task(receiver.run())
    await until(lambda: receiver.lease.state is ReceiveState.RECEIVING)
    address = kit.transport.address
    await there.send(address, 1, frame_of(source, key=bytes(32)))
    await there.send(address, 1, frame_of(source))
    await there.send(address, 1, frame_of(source, key=bytes(32)))
    await there.send(address, 1, record_of())
    received = await running
    assert received.handover.first_token == 42
    assert (receiver.lease.foreign_frames, receiver.lease.corrupt_frames) == (2, 0)
    assert torch.equal(pool.tensor[:, :, 4], source.tensor[:, :, 2])


@pytest.mark.parametrize("came", [0, 1])
async def test_what_was_lost_is_asked_for_once_all_is_sent_and_not_after_a_lease(
    link, source, came
):
    pool, kit, there = link
    receiver = new_receiver(pool, kit, lease_s=300.0)
    asked = []
    receiver._on_missing = asked.append
    running = asyncio.create_task(receiver.run())
    await until(lambda: receiver.lease.state is ReceiveState.RECEIVING)
    address = kit.transport.address
    if came:
        await there.send(address, 1, frame_of(source))
        await until(lambda: receiver.lease.has(0))
    receiver.all_sent()
    await until(lambda: asked == [()])  # the record says what else is missing
    await there.send(address, 1, record_of())
    if not came:
        await until(lambda: asked == [(), (0,)])
        await there.send(address, 1, frame_of(source))
        await there.send(address, 1, record_of())
    assert (await running).handover.first_token == 42


async def test_a_renewal_does_not_put_off_what_is_asked_for(link):
    pool, kit, _ = link
    receiver = new_receiver(pool, kit, lease_s=300.0)
    asked = []
    receiver._on_missing = asked.append
    running = asyncio.create_task(receiver.run())
    await until(lambda: receiver._waiting)
    receiver.all_sent()
    while not asked:
        receiver.renew()
        await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait([running])


async def test_what_was_noted_of_a_message_becomes_an_event(link, source):
    pool, kit, there = link
    receiver = new_receiver(pool, kit)
    running = asyncio.create_task(receiver.run())
    await until(lambda: receiver.lease.state is ReceiveState.RECEIVING)
    frame = frame_of(source)
    await there.send(kit.transport.address, 1, frame)
    record = record_of(gather_seconds_each=[0.25], send_seconds_each=[0.5])
    await there.send(kit.transport.address, 1, record)
    (event,) = (await running).events
    attributes = event.attributes
    assert attributes.pop("kvrelay.kv.receive_ms") > 0
    assert attributes == {
        "kvrelay.kv.message": 0,
        "kvrelay.kv.messages": 1,
        "kvrelay.kv.first_layer": 0,
        "kvrelay.kv.layers": 3,
        "kvrelay.kv.blocks": 2,
        "kvrelay.kv.bytes": len(frame),
        "kvrelay.kv.gather_ms": 250.0,
        "kvrelay.kv.send_ms": 500.0,
        "kvrelay.kv.gigabytes_per_second": len(frame) / 0.5 / 1e9,
    }
