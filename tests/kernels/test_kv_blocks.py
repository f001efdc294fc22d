"""Moving whole blocks to and from one buffer."""

import pytest
import torch

from kvrelay_kernels.kv_gather import kv_gather, kv_scatter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [[3], [5, 0, 2], [0, 1, 2, 3, 4, 5]])
def test_gather_and_scatter_are_inverse(blocks, dtype):
    torch.manual_seed(0)
    pool = torch.randn(4, 2, 6, 3, 2, 5).to(dtype)
    index = torch.tensor(blocks)
    buffer = torch.empty(2, 2, len(blocks), 3, 2, 5, dtype=dtype)
    kv_gather(pool[1:3], index, buffer)
    for place, block in enumerate(blocks):
        assert torch.equal(buffer[:, :, place], pool[1:3, :, block])

    other = torch.zeros_like(pool)
    kv_scatter(other[1:3], index, buffer)
    assert torch.equal(other[1:3, :, blocks], pool[1:3, :, blocks])
    untouched = [block for block in range(6) if block not in blocks]
    assert not other[1:3, :, untouched].any()
    assert not other[0].any()
    assert not other[3].any()


def test_wrong_shapes_are_named():
    pool = torch.zeros(1, 2, 4, 3, 2, 5)
    with pytest.raises(ValueError, match="out has shape"):
        kv_gather(pool, torch.tensor([0, 1]), torch.zeros(1, 2, 1, 3, 2, 5))
    with pytest.raises(ValueError, match="dimensions"):
        kv_scatter(pool[0], torch.tensor([0]), torch.zeros(1, 2, 1, 3, 2, 5))
