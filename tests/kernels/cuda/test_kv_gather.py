"""Blocks and their digest in Triton against the torch reference.

On a GPU the kernel runs compiled, elsewhere in Triton's interpreter, with fewer words a program there.
"""

import pytest
import torch

from kvrelay_kernels.kv_gather import finish_digest, kv_digest
from kvrelay_kernels.reference.kv_gather import kv_gather_reference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.filterwarnings(
    # Modulo 2^64, on purpose; NumPy, which interprets the kernel, mentions it.
    "ignore:overflow encountered:RuntimeWarning"
)


@pytest.fixture
def op(monkeypatch):
    from kvrelay_kernels.cuda import kv_gather

    if not ON_GPU:
        monkeypatch.setattr(kv_gather, "WORDS", 16)
    return kv_gather


def make_pool(dtype):
    torch.manual_seed(0)
    return torch.randn(4, 2, 6, 3, 2, 20, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("blocks", "valid"), [([3], 1), ([5, 0, 2], 2), ([1, 4], 3)])
def test_gather_equals_the_reference_and_its_digest(op, blocks, valid, dtype):
    pool = make_pool(dtype)[1:3]
    index = torch.tensor(blocks, device=DEVICE)
    out = torch.full((2, 2, len(blocks), 3, 2, 20), float("nan"), dtype=dtype, device=DEVICE)
    expected = out.clone()
    kv_gather_reference(pool, index, expected, valid_tokens=valid)
    sums = op.kv_gather_cuda(pool, index, out, valid_tokens=valid, digest=True)
    assert torch.equal(out, expected)
    assert finish_digest(sums, out.nbytes) == kv_digest(expected.cpu())
    poisoned = torch.full_like(out, float("nan"))
    assert op.kv_gather_cuda(pool, index, poisoned, valid_tokens=valid, digest=False) is None
    assert torch.equal(poisoned, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scatter_writes_its_blocks_alone_and_digests_what_it_read(op, dtype):
    source = make_pool(dtype)
    index = torch.tensor([4, 1, 5], device=DEVICE)
    buffer = source[1:3, :, index].contiguous()
    target = torch.zeros_like(source)
    sums = op.kv_scatter_cuda(target[1:3], index, buffer, digest=True)
    expected = torch.zeros_like(source)
    expected[1:3, :, index] = buffer
    assert torch.equal(target, expected)
    assert finish_digest(sums, buffer.nbytes) == kv_digest(buffer.cpu())
