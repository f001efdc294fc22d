"""The pool's tensors, their size, and the wire layout."""

import math

import pytest
import torch
from tiny_models import tiny_model

from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.cache.sizing import kv_bytes_per_block
from kvrelay_engine.models.weights import load_model_config
from kvrelay_kernels.kv_gather import digests_while_copying

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def make_pool(dtype=torch.float32, device="cpu", num_blocks=7, fill=True, **options):
    config = load_model_config(tiny_model("llama3"))
    sizes = {"num_blocks": num_blocks, "block_size": 4} | options
    pool = KVPool(config, device=torch.device(device), dtype=dtype, **sizes)
    if fill:
        torch.manual_seed(0)
        pool.tensor.copy_(torch.randn(pool.tensor.shape))
    return pool


def gathered(pool, first, end, blocks, valid):
    out = bytearray(b"\xff" * pool.wire_bytes(first, end, len(blocks)))
    pool.gather(first, end, blocks, memoryview(out), valid)
    return bytes(out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_agree(dtype):
    pool = make_pool(dtype)
    assert pool.tensor.shape == (3, 2, 7, 4, 2, 16)
    assert pool.tensor.nbytes == 7 * pool.bytes_per_block
    config = load_model_config(tiny_model("llama3"))
    assert pool.bytes_per_block == kv_bytes_per_block(config, 4, dtype.itemsize)
    assert pool.wire_bytes(0, 3, 2) == 2 * pool.bytes_per_block
    assert 3 * pool.wire_bytes(1, 2, 5) == 5 * pool.bytes_per_block


def test_a_fresh_pool_is_zero():
    assert not make_pool(fill=False).tensor.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "end"), [(0, 3), (1, 2), (0, 1), (1, 3)])
def test_the_wire_layout_is_row_major_in_block_order(first, end, dtype, device):
    pool = make_pool(dtype, device)
    blocks = [5, 0, 3]
    data = gathered(pool, first, end, blocks, 4)
    expected = pool.tensor.cpu()[first:end][:, :, blocks].contiguous()
    assert data == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("valid", [1, 3, 4])
def test_the_tail_of_a_partial_block_is_zero_on_the_wire_only(valid, device):
    pool = make_pool(device=device)
    before = pool.tensor.clone()
    data = gathered(pool, 0, 3, [2, 6], valid)
    wire = torch.frombuffer(bytearray(data), dtype=torch.float32).view(3, 2, 2, 4, 2, 16)
    assert not wire[:, :, 1, valid:].any()
    assert torch.equal(wire[:, :, 1, :valid], before.cpu()[:, :, 6, :valid])
    assert torch.equal(wire[:, :, 0], before.cpu()[:, :, 2])
    assert torch.equal(pool.tensor, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_is_the_inverse_of_gather_into_other_blocks(dtype, device):
    source, target = make_pool(dtype, device), make_pool(dtype, device, num_blocks=9)
    before = target.tensor.clone()
    for first, end in ((0, 2), (2, 3)):
        payload = gathered(source, first, end, [1, 4, 6], 4)
        target.scatter(first, end, [8, 0, 3], memoryview(payload))
    assert torch.equal(target.tensor[:, :, [8, 0, 3]], source.tensor[:, :, [1, 4, 6]])
    rest = [1, 2, 4, 5, 6, 7]
    assert torch.equal(target.tensor[:, :, rest], before[:, :, rest])


def test_buffers_may_be_tensors_or_unaligned_views():
    pool = make_pool(torch.bfloat16)
    size = pool.wire_bytes(0, 3, 2)
    plain = gathered(pool, 0, 3, [0, 1], 2)
    tensor = torch.empty(size, dtype=torch.uint8)
    pool.gather(0, 3, [0, 1], tensor, 2)
    assert tensor.numpy().tobytes() == plain
    framed = bytearray(size + 5)
    pool.gather(0, 3, [0, 1], memoryview(framed)[3 : 3 + size], 2)
    assert bytes(framed[3 : 3 + size]) == plain
    other = make_pool(torch.bfloat16, fill=False)
    other.scatter(0, 3, [5, 2], memoryview(framed)[3 : 3 + size])
    again = make_pool(torch.bfloat16, fill=False)
    again.scatter(0, 3, [5, 2], tensor)
    assert torch.equal(other.tensor, again.tensor)
    assert other.tensor.any()


def test_wrong_arguments_are_named():
    pool = make_pool()
    buffer = memoryview(bytearray(pool.wire_bytes(0, 3, 1)))
    with pytest.raises(ValueError, match="0 valid tokens in a block of 4"):
        pool.gather(0, 3, [0], buffer, 0)
    with pytest.raises(ValueError, match="5 valid tokens"):
        pool.gather(0, 3, [0], buffer, 5)
    for first, end in ((0, 4), (2, 2), (-1, 1)):
        with pytest.raises(ValueError, match=rf"layers \[{first}, {end}\) of 3"):
            pool.gather(first, end, [0], buffer, 4)
    for blocks in ([], [7], [-1]):
        with pytest.raises(ValueError, match=r"outside 0\.\.6"):
            pool.gather(0, 3, blocks, buffer, 4)
        with pytest.raises(ValueError, match=r"outside 0\.\.6"):
            pool.scatter(0, 3, blocks, buffer)
    with pytest.raises(ValueError, match="the buffer is"):
        pool.gather(0, 3, [0], buffer[:-1], 4)
    with pytest.raises(ValueError, match="the buffer is"):
        pool.scatter(0, 2, [0], buffer)
    with pytest.raises(ValueError, match="named twice"):
        pool.scatter(0, 3, [1, 1], memoryview(bytes(2 * len(buffer))))


@pytest.mark.parametrize("device", DEVICES)
def test_both_sides_digest_what_they_copy(device):
    source, target = make_pool(device=device), make_pool(device=device, fill=False)
    payload = bytearray(source.wire_bytes(0, 2, 2))
    sent = source.gather(0, 2, [3, 1], memoryview(payload), 2)
    assert target.scatter(0, 2, [0, 5], memoryview(payload)) is None
    assert sent in (None, target.scatter(0, 2, [0, 5], memoryview(payload), digest=True))
    payload[100] ^= 1
    assert target.scatter(0, 2, [0, 5], memoryview(payload), digest=True) != sent


def sequence(pool, blocks, heads=None):
    """What a sequence's positions hold, `[layers, 2, positions, heads, head_dim]`."""
    rows = pool.tensor[:, :, list(blocks)].flatten(2, 3)
    return rows if heads is None else rows[:, :, :, heads.start : heads.stop]


def moved(source, target, source_blocks, target_blocks, tokens, heads=None, **options):
    """Both digests of a move of these tokens."""
    heads = source.heads if heads is None else heads
    shape = (source.num_layers, 2, len(tokens), len(heads), source.tensor.shape[-1])
    payload = bytearray(math.prod(shape) * target.dtype.itemsize)
    sent = source.gather_tokens(
        0, 3, source_blocks, tokens, memoryview(payload), heads=heads, dtype=target.dtype,
        digest=heads == target.heads,
    )  # fmt: skip
    return sent, target.scatter_tokens(
        0, 3, target_blocks, tokens, memoryview(payload), heads=heads,
        digest=sent is not None, **options
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [range(11), range(3, 9), range(4, 8), range(10, 11)])
def test_tokens_find_their_places_in_blocks_of_another_size(tokens, dtype, device):
    source = make_pool(dtype, device)
    target = make_pool(dtype, device, num_blocks=5, block_size=3)
    before = target.tensor.clone()
    sent, taken = moved(source, target, [5, 0, 3], [4, 1, 0, 2], tokens)
    assert sent == taken
    assert (sent is not None) == digests_while_copying(source.tensor)
    here, there = sequence(source, [5, 0, 3]), sequence(target, [4, 1, 0, 2])
    assert torch.equal(here[:, :, tokens], there[:, :, tokens])
    rest = [position for position in range(12) if position not in tokens]
    untouched = before[:, :, [4, 1, 0, 2]].flatten(2, 3)[:, :, rest]
    assert torch.equal(there[:, :, rest], untouched)
    assert torch.equal(target.tensor[:, :, 3], before[:, :, 3]), "a block of somebody else"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("into", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_arrive_rounded_to_the_receivers_dtype(dtype, into, device):
    source, target = make_pool(dtype, device), make_pool(into, device, fill=False)
    moved(source, target, [5, 0, 3], [1, 2, 4], range(10))
    here = sequence(source, [5, 0, 3])[:, :, :10].to(into)
    assert torch.equal(sequence(target, [1, 2, 4])[:, :, :10], here)


@pytest.mark.parametrize("clear", [True, False])
def test_what_lies_behind_a_prompt_is_cleared_where_asked(clear):
    source, target = make_pool(), make_pool()
    target.tensor.fill_(torch.nan)
    moved(source, target, [5, 0], [1, 2], range(4, 6), clear_behind=clear)
    tail = target.tensor[:, :, 2, 2:]
    assert (tail == 0).all() if clear else tail.isnan().all()
    assert target.tensor[:, :, 1].isnan().all()
    assert target.tensor[:, :, 3].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_pools_that_share_the_heads_of_one_fill_it_together_and_from_it(device):
    whole = make_pool(device=device)
    parts = [make_pool(device=device, heads=range(n, n + 1)) for n in range(2)]
    assert all(2 * part.bytes_per_block == whole.bytes_per_block for part in parts)
    for part in parts:
        moved(whole, part, [5, 0, 3], [1, 2, 4], range(11), part.heads)
        here = sequence(whole, [5, 0, 3], part.heads)[:, :, :11]
        assert torch.equal(sequence(part, [1, 2, 4])[:, :, :11], here)
    again = make_pool(device=device, fill=False)
    for part in parts:
        moved(part, again, [1, 2, 4], [6, 3, 2], range(11), part.heads, clear_behind=True)
    there = sequence(again, [6, 3, 2])
    assert torch.equal(there[:, :, :11], sequence(whole, [5, 0, 3])[:, :, :11])
    assert not there[:, :, 11:].any()


def test_wrong_tokens_and_heads_are_named():
    pool = make_pool()
    buffer = memoryview(bytearray(64))
    for tokens in (range(0), range(9), range(-1, 3)):
        with pytest.raises(ValueError, match=r"empty or outside 2 blocks"):
            pool.scatter_tokens(0, 3, [0, 1], tokens, buffer, heads=pool.heads)
    for heads in (range(0), range(3), range(1, 3)):
        with pytest.raises(ValueError, match=r"heads .* are none, or not among range\(0, 2\)"):
            pool.gather_tokens(0, 3, [0], range(2), buffer, heads=heads, dtype=pool.dtype)
    with pytest.raises(ValueError, match="named twice"):
        pool.scatter_tokens(0, 3, [1, 1], range(2), buffer, heads=pool.heads)
    with pytest.raises(ValueError, match="a part of the heads"):
        pool.scatter_tokens(0, 3, [1], range(2), buffer, heads=range(1), digest=True)
    for heads in (range(1), range(2)):
        with pytest.raises(ValueError, match="the buffer is 64 bytes"):
            pool.scatter_tokens(0, 3, [1], range(2), buffer, heads=heads)
