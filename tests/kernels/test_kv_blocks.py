"""Moving whole blocks to and from one buffer, and the digest of what moved."""

import numpy as np
import pytest
import torch

from kvrelay_kernels import kv_gather as op
from kvrelay_kernels.cpu.library import cpu_library
from kvrelay_kernels.kv_gather import (
    kv_digest,
    kv_gather,
    kv_gather_digest,
    kv_scatter,
    kv_scatter_digest,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK = 2**64 - 1
G, F, S = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD


@pytest.fixture(params=["native", "torch"])
def implementation(request, monkeypatch):
    """Both ways of the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(op, "cpu_library", lambda: None)
    elif cpu_library() is None:
        pytest.skip("no C++ compiler")


def make_pool(dtype=torch.float32, *, layers=4, blocks=6, token=(2, 4)):
    torch.manual_seed(0)
    return torch.randn(layers, 2, blocks, 3, *token).to(dtype)


def fold(value, bits):
    return value ^ (value >> bits)


def digest_by_formula(data):
    """The docstring's formula with Python integers."""
    words = np.frombuffer(data + bytes(-len(data) % 8), dtype="<u8").tolist()
    a = b = 0
    for i, word in enumerate(words):
        x = (word + (i + 1) * G) & MASK
        y = (fold(x, 32) * F) & MASK
        a = (a + fold(y, 29)) & MASK
        b = (b + fold((fold(y, 29) * S) & MASK, 32)) & MASK

    def scramble(value):
        return fold((fold((fold(value, 32) * F) & MASK, 29) * S) & MASK, 32)

    a = (a + len(data) * G) & MASK
    b ^= scramble(a)
    a ^= scramble(b)
    return a.to_bytes(8, "little") + b.to_bytes(8, "little")


def as_bytes(tensor):
    return tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("token", [(2, 4), (3, 5)], ids=["whole words", "odd bytes"])
@pytest.mark.parametrize("blocks", [[3], [5, 0, 2], [0, 1, 2, 3, 4, 5]])
def test_gather_and_scatter_are_inverse_and_digest_alike(blocks, token, dtype):
    pool = make_pool(dtype, token=token)
    index = torch.tensor(blocks)
    buffer = torch.full((2, 2, len(blocks), 3, *token), float("nan"), dtype=dtype)
    kv_gather(pool[1:3], index, buffer)
    for place, block in enumerate(blocks):
        assert torch.equal(buffer[:, :, place], pool[1:3, :, block])

    other = torch.zeros_like(pool)
    digest = kv_scatter_digest(other[1:3], index, buffer)
    assert digest == digest_by_formula(as_bytes(buffer)) == kv_digest(buffer)
    assert torch.equal(other[1:3, :, blocks], pool[1:3, :, blocks])
    untouched = [block for block in range(6) if block not in blocks]
    assert not other[1:3, :, untouched].any()
    assert not other[0].any()
    assert not other[3].any()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("valid", [1, 2, 3])
def test_rows_past_the_valid_tokens_are_zero_in_the_buffer_only(valid, dtype):
    pool = make_pool(dtype)
    before = pool.clone()
    buffer = torch.full((4, 2, 2, 3, 2, 4), float("nan"), dtype=dtype)
    digest = kv_gather_digest(pool, torch.tensor([4, 1]), buffer, valid_tokens=valid)
    assert torch.equal(buffer[:, :, 0], pool[:, :, 4])
    assert torch.equal(buffer[:, :, 1, :valid], pool[:, :, 1, :valid])
    assert not buffer[:, :, 1, valid:].any()
    assert digest == digest_by_formula(as_bytes(buffer))
    assert torch.equal(pool, before)


@pytest.mark.usefixtures("implementation")
def test_blocks_larger_than_a_slice_and_several_threads_give_the_same_digest():
    pool = make_pool(layers=3, blocks=5, token=(30, 1001))
    index = torch.tensor([4, 0, 2])
    buffer = torch.empty(3, 2, 3, 3, 30, 1001)
    if op.cpu_library() is None:
        digests = {kv_gather_digest(pool, index, buffer)}
    else:
        library = cpu_library()
        before = library.threads
        digests = set()
        for threads in (1, 3):
            library.set_threads(threads)
            digests.add(kv_gather_digest(pool, index, buffer))
            library.set_threads(before)
    assert digests == {kv_digest(buffer)}


def test_every_changed_bit_and_every_exchange_of_words_changes_the_digest():
    torch.manual_seed(0)
    words = torch.randint(-(2**63), 2**63 - 1, (11,))
    seen = {kv_digest(words)}
    for place in range(11):
        for bit in range(64):
            changed = words.clone()
            changed[place] ^= 1 << bit if bit < 63 else -(2**63)
            seen.add(kv_digest(changed))
        for other in range(place):
            swapped = words.clone()
            swapped[[place, other]] = words[[other, place]]
            seen.add(kv_digest(swapped))
    assert len(seen) == 1 + 11 * 64 + 55


def test_payloads_of_zeros_differ_by_their_length():
    digests = {kv_digest(torch.zeros(size, dtype=torch.uint8)) for size in range(1, 40)}
    assert len(digests) == 39
    assert kv_digest(torch.zeros(8, dtype=torch.uint8)) == digest_by_formula(bytes(8))


@pytest.mark.usefixtures("implementation")
def test_wrong_arguments_are_named():
    pool = torch.zeros(1, 2, 4, 3, 2, 4)
    buffer = torch.zeros(1, 2, 2, 3, 2, 4)
    with pytest.raises(ValueError, match="out has shape"):
        kv_gather(pool, torch.tensor([0, 1]), buffer[:, :, :1].contiguous())
    with pytest.raises(ValueError, match="dimensions"):
        kv_scatter(pool[0], torch.tensor([0]), buffer)
    with pytest.raises(ValueError, match="0 valid tokens in a block of 3"):
        kv_gather(pool, torch.tensor([0, 1]), buffer, valid_tokens=0)
    with pytest.raises(ValueError, match="not contiguous"):
        kv_gather(pool, torch.tensor([0]), buffer[:, :, :1])
    with pytest.raises(ValueError, match="empty"):
        kv_scatter(pool, torch.tensor([], dtype=torch.int64), buffer[:, :, :0])
    for wrong in (-1, 4):
        with pytest.raises(IndexError):
            kv_gather(pool, torch.tensor([0, wrong]), buffer)
        with pytest.raises(IndexError):
            kv_scatter(pool, torch.tensor([wrong, 0]), buffer)
