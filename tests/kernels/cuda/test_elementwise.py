"""The Triton kernels of the small ops against the torch reference, at odd shapes.

On a GPU they run compiled, elsewhere in Triton's interpreter.
"""

import pytest
import torch

from kvrelay_kernels.reference.rms_norm import add_rms_norm_reference, rms_norm_reference
from kvrelay_kernels.reference.rotary_kv_write import rotary_kv_write_reference
from kvrelay_kernels.reference.silu_mul import silu_mul_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: 2e-6,
    # One unit in the last place; two roundings of the interpreter truncate.
    torch.bfloat16: 8e-3 if DEVICE == "cuda" else 2.4e-2,
    torch.float16: 1e-3,
}
"""Sums are taken in another order."""


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(actual, expected):
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def poisoned(like):
    return torch.full_like(like, float("nan"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 96), (4, 600)])
def test_rms_norm(shape, dtype):
    from kvrelay_kernels.cuda.rms_norm import rms_norm_cuda

    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)
    out = rms_norm_cuda(x, weight, 1e-5, out=poisoned(x))
    close(out, rms_norm_reference(x, weight, 1e-5, out=poisoned(x)))


def test_rms_norm_of_rows_that_lie_apart():
    from kvrelay_kernels.cuda.rms_norm import rms_norm_cuda

    x, weight = normal(5, 64)[:, 10:43], normal(33)
    out = rms_norm_cuda(x, weight, 1e-5, out=torch.empty(5, 33, device=DEVICE))
    close(out, rms_norm_reference(x, weight, 1e-5, out=torch.empty(5, 33, device=DEVICE)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_leaves_the_rounded_sum_in_the_residual(dtype):
    from kvrelay_kernels.cuda.rms_norm import add_rms_norm_cuda

    x, residual, weight = (
        normal(3, 100, dtype=dtype),
        normal(3, 100, dtype=dtype),
        normal(100, dtype=dtype),
    )
    expected_residual = residual.clone()
    expected = add_rms_norm_reference(x, expected_residual, weight, 1e-6, out=poisoned(x))
    # The result may take the place of the addend.
    close(add_rms_norm_cuda(x, residual, weight, 1e-6, out=x), expected)
    close(residual, expected_residual)
    if dtype != torch.bfloat16 or DEVICE == "cuda":
        assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 3, 2600)])
def test_silu_mul(shape, dtype):
    from kvrelay_kernels.cuda.silu_mul import silu_mul_cuda

    gate_up = normal(*shape, dtype=dtype) * 3
    out = poisoned(gate_up[..., : shape[-1] // 2].contiguous())
    close(silu_mul_cuda(gate_up, out=out.clone()), silu_mul_reference(gate_up, out=out))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "head norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "angles"),
    [(1, 1, 2, 1), (4, 2, 16, 8), (14, 2, 10, 3), (6, 3, 12, 6)],
)
def test_rotary_kv_write(heads, kv_heads, head_dim, angles, dtype, norm):
    from kvrelay_kernels.cuda.rotary_kv_write import rotary_kv_write_cuda

    tokens, block_size = 5, 4
    # Rows further apart than their heads, as in a buffer shared with something else.
    qkv = normal(tokens, heads + 2 * kv_heads + 1, head_dim, dtype=dtype)[:, :-1]
    theta = normal(tokens, angles)
    slots = torch.tensor([11, 0, 4, 7, 23], device=DEVICE)
    norms = {"query_norm": None, "key_norm": None, "eps": 1e-5}
    if norm:
        norms |= {name: normal(head_dim, dtype=dtype) for name in ("query_norm", "key_norm")}
    shape = (6, block_size, kv_heads, head_dim)
    caches = [poisoned(normal(*shape, dtype=dtype)) for _ in range(4)]
    expected = qkv.clone()
    rotary_kv_write_reference(expected, *caches[:2], slots, theta.cos(), theta.sin(), **norms)
    rotary_kv_write_cuda(qkv, *caches[2:], slots, theta.cos(), theta.sin(), **norms)
    close(qkv[:, :heads], expected[:, :heads])
    for reference, written in ((caches[0], caches[2]), (caches[1], caches[3])):
        filled = torch.zeros(shape[0] * block_size, dtype=torch.bool, device=DEVICE)
        filled[slots] = True
        flat = written.view(-1, kv_heads, head_dim)
        close(flat[filled], reference.view(-1, kv_heads, head_dim)[filled])
        assert flat[~filled].isnan().all()


def test_a_float8_cache_is_scaled_and_saturates():
    from kvrelay_kernels.cuda.rotary_kv_write import rotary_kv_write_cuda

    # Numbers that fit: the interpreter rounds others its own way.
    qkv = (torch.randint(-7, 8, (3, 4, 8), device=DEVICE) / 4).bfloat16()
    qkv[0, 3, 0], qkv[1, 3, 1] = 3000.0, -3000.0
    key, value = (torch.zeros(1, 4, 1, 8, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2))
    slots = torch.tensor([2, 0, 1], device=DEVICE)
    still = torch.zeros(3, 4, device=DEVICE)
    before = qkv.clone().float()
    rotary_kv_write_cuda(
        qkv, key, value, slots, still.cos(), still.sin(),
        query_norm=None, key_norm=None, eps=0.0, key_scale=0.5, value_scale=2.0,
    )  # fmt: skip
    for cache, head, scale in ((key, 2, 0.5), (value, 3, 2.0)):
        expected = (before[:, head] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(cache.view(4, 8)[slots].float(), expected.float())


def test_heads_and_rows_must_be_contiguous():
    from kvrelay_kernels.cuda.rms_norm import rms_norm_cuda
    from kvrelay_kernels.cuda.silu_mul import silu_mul_cuda

    x = normal(4, 6).T
    with pytest.raises(ValueError, match="rows of x"):
        rms_norm_cuda(x, normal(4), 1e-5, out=torch.empty(6, 4, device=DEVICE))
    with pytest.raises(ValueError, match="rows of gate_up"):
        silu_mul_cuda(x, out=torch.empty(6, 2, device=DEVICE))
