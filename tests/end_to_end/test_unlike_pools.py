"""Hand-overs between pools that are cut differently: by blocks, dtypes and heads. No model computes here."""

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from kvrelay_decode.receiver import KvReceiver, Received
from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.sequence import SequenceSpec
from kvrelay_kernels.cpu.library import cpu_library
from kvrelay_prefill.sender import FirstOutput, KvSender
from kvrelay_protocol.errors import LayoutMismatch
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_protocol.trace import TraceContext
from kvrelay_transfer.frames import HEADER_SIZE
from kvrelay_transfer.inproc import InprocTransport
from kvrelay_transfer.kit import TransferKit
from kvrelay_transfer.layout import KvLayout, Piece
from kvrelay_transfer.lease import LeaseId, OpenLease
from kvrelay_transfer.staging import StagingBuffers
from kvrelay_transfer.ticket import new_ticket

LAYERS, HEADS, HEAD_DIM, BLOCKS = 3, 4, 8, 32
MODEL = SimpleNamespace(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=HEAD_DIM)
LAYOUT = KvLayout("model", "float32", 4, LAYERS, HEADS, HEAD_DIM)
TIME_S = 60.0


@dataclass
class Side:
    """A pool, what it can receive into or send from, and the blocks of one sequence."""

    kit: TransferKit
    pool: KVPool
    blocks: tuple[int, ...]

    def rows(self, heads: range = range(HEADS)) -> torch.Tensor:
        """What the sequence's positions hold, `[layers, 2, positions, heads, head_dim]`."""
        first = self.pool.heads.start
        rows = self.pool.tensor[:, :, list(self.blocks)].flatten(2, 3)
        return rows[:, :, :, heads.start - first : heads.stop - first]


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    """As a worker's start does; it may compile, longer than any test's time limit."""
    cpu_library()


async def side(tokens: int, *, seed: int = 0, **changes: object) -> Side:
    """A started one; its blocks hold random numbers."""
    layout = replace(LAYOUT, **changes)
    transport = InprocTransport()
    await transport.start()
    staging = StagingBuffers(4, HEADER_SIZE + max(1024, layout.layer_block_bytes))
    pool = KVPool(
        MODEL,
        num_blocks=BLOCKS,
        block_size=layout.block_size,
        device=torch.device("cpu"),
        dtype=getattr(torch, layout.dtype),
        heads=layout.heads,
    )
    generator = torch.Generator().manual_seed(seed)
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=generator))
    order = torch.randperm(BLOCKS, generator=generator).tolist()
    count = -(-tokens // layout.block_size)
    return Side(TransferKit(transport, staging, layout), pool, tuple(order[:count]))


def spec_of(tokens: int) -> SequenceSpec:
    prompt = tuple(range(100, 100 + tokens))
    return SequenceSpec(1, "r", prompt, 0, 5, frozenset(), SamplingParams(), TIME_S, "", b"tenant")


async def hand_over(
    source: Side,
    target: Side,
    tokens: int,
    *,
    first_block: int = 0,
    heads: range | None = None,
    chunk: int = 8,
) -> Received:
    """One transfer, its prompt written chunk by chunk, every layer by itself."""
    spec = spec_of(tokens)
    sender = KvSender(spec, source.kit, source.pool, lease_s=TIME_S, on_sent=lambda _: None)
    identity, ticket = LeaseId(secrets.token_bytes(16), 1, 1), new_ticket()
    tag, kit = secrets.randbits(64), target.kit
    room = min(kit.staging.nbytes, source.kit.staging.nbytes)
    lease = OpenLease(identity, tag, kit.transport.address, first_block, room, kit.layout, ticket)
    receiver = KvReceiver(
        identity,
        ticket=ticket,
        tag=tag,
        spec=spec,
        prompt_blocks=target.blocks,
        first_block=first_block,
        kit=kit,
        pool=target.pool,
        lease_s=TIME_S,
        deadline=time.monotonic() + TIME_S,
        on_posted=lambda: sender.open(lease),
        on_missing=lambda numbers: sender.resend(list(numbers)),
        heads=heads,
    )
    sending = asyncio.create_task(sender.run())
    sender.admitted(source.blocks, 0, TraceContext.new())
    for start in range(0, tokens, chunk):
        for layer in range(LAYERS):
            sender.written(Piece(layer, 1, start, min(chunk, tokens - start)))
    sender.computed(FirstOutput(token=9, cached_tokens=0))
    try:
        return await receiver.run()
    finally:
        sender.release()
        with contextlib.suppress(LayoutMismatch):
            await sending


async def close(*sides: Side) -> None:
    for each in sides:
        assert each.kit.staging.held == 0
        await each.kit.close()


@pytest.mark.parametrize("sizes", [(4, 4), (4, 16), (16, 4), (4, 3), (1, 8), (8, 1)])
@pytest.mark.parametrize("tokens", [1, 8, 23, 24])
async def test_kv_lands_at_its_positions_whatever_the_blocks(sizes, tokens):
    source = await side(tokens, block_size=sizes[0], seed=1)
    target = await side(tokens, block_size=sizes[1], seed=2)
    untouched = target.pool.tensor.clone()
    received = await hand_over(source, target, tokens, chunk=max(16, sizes[0]))
    assert torch.equal(target.rows()[:, :, :tokens], source.rows()[:, :, :tokens])
    assert not target.rows()[:, :, tokens:].any(), "the rest of the last block is zeros"
    others = [block for block in range(BLOCKS) if block not in target.blocks]
    assert torch.equal(target.pool.tensor[:, :, others], untouched[:, :, others])
    assert sum(event.arrived.messages for event in received.events) == received.messages - 1
    await close(source, target)


@pytest.mark.parametrize("sizes", [(4, 4), (4, 3), (3, 4), (2, 8)])
@pytest.mark.parametrize("first_block", [0, 1, 2])
async def test_blocks_the_receiver_has_are_neither_sent_nor_touched(sizes, first_block):
    tokens = 2 * sizes[1] + 3
    source = await side(tokens, block_size=sizes[0], seed=1)
    target = await side(tokens, block_size=sizes[1], seed=2)
    before, begin = target.rows().clone(), first_block * sizes[1]
    chunk = 2 * sizes[0]
    received = await hand_over(source, target, tokens, first_block=first_block, chunk=chunk)
    assert torch.equal(target.rows()[:, :, :begin], before[:, :, :begin])
    assert torch.equal(target.rows()[:, :, begin:tokens], source.rows()[:, :, begin:tokens])
    assert min(event.arrived.tokens.start for event in received.events) == begin
    await close(source, target)


@pytest.mark.parametrize("into", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block_size", [4, 8])
async def test_kv_arrives_in_the_receivers_dtype(dtype, into, block_size):
    source = await side(21, dtype=dtype, seed=1)
    target = await side(21, dtype=into, block_size=block_size, seed=2)
    await hand_over(source, target, 21)
    expected = source.rows()[:, :, :21].to(target.pool.dtype)
    assert torch.equal(target.rows()[:, :, :21], expected)
    await close(source, target)


@pytest.mark.parametrize("unlike", [{}, {"block_size": 8}, {"dtype": "bfloat16"}])
async def test_two_senders_with_half_of_the_heads_fill_one_receiver(unlike):
    halves = [await side(21, tensor_parallel=2, tensor_rank=n, seed=n) for n in range(2)]
    target = await side(21, seed=2, **unlike)
    await asyncio.gather(*(hand_over(half, target, 21, heads=half.pool.heads) for half in halves))
    for half in halves:
        expected = half.rows(half.pool.heads)[:, :, :21].to(target.pool.dtype)
        assert torch.equal(target.rows(half.pool.heads)[:, :, :21], expected)
    assert not target.rows()[:, :, 21:].any()
    await close(*halves, target)


@pytest.mark.parametrize("unlike", [{}, {"block_size": 8}, {"dtype": "bfloat16"}])
async def test_one_sender_fills_two_receivers_with_half_of_the_heads(unlike):
    source = await side(21, seed=2)
    halves = [await side(21, tensor_parallel=2, tensor_rank=n, seed=n, **unlike) for n in range(2)]
    await asyncio.gather(*(hand_over(source, half, 21) for half in halves))
    for half in halves:
        expected = source.rows(half.pool.heads)[:, :, :21].to(half.pool.dtype)
        assert torch.equal(half.rows(half.pool.heads)[:, :, :21], expected)
    await close(source, *halves)


async def test_halves_of_the_heads_travel_as_blocks_between_equals():
    source = await side(21, tensor_parallel=2, tensor_rank=1, seed=1)
    target = await side(21, tensor_parallel=2, tensor_rank=1, seed=2)
    await hand_over(source, target, 21)
    heads = range(2, 4)
    assert torch.equal(target.rows(heads)[:, :, :21], source.rows(heads)[:, :, :21])
    await close(source, target)


@pytest.mark.parametrize("unlike", [{}, {"block_size": 3}, {"dtype": "bfloat16"}])
async def test_a_prompt_longer_than_a_message_is_cut_and_put_together(unlike):
    source = await side(90, seed=1)
    target = await side(90, seed=2, **({"block_size": 4} | unlike))
    received = await hand_over(source, target, 90, chunk=88)
    assert received.messages > 12
    expected = source.rows()[:, :, :90].to(target.pool.dtype)
    assert torch.equal(target.rows()[:, :, :90], expected)
    await close(source, target)
