"""The compiled norms, gate and rotary embedding: against torch, and bit for bit against themselves."""

import pytest
import torch

from kvrelay_kernels.cpu import rms_norm as cpu_rms_norm
from kvrelay_kernels.reference.rms_norm import rms_norm_reference
from kvrelay_kernels.reference.rotary_kv_write import rotary_kv_write_reference
from kvrelay_kernels.rms_norm import add_rms_norm, rms_norm
from kvrelay_kernels.rotary_kv_write import rotary_kv_write
from kvrelay_kernels.silu_mul import silu_mul

NAN = float("nan")
WIDTHS = [1, 15, 16, 33, 64, 67, 576, 1280]


def strided(rows, width):
    """Noise in rows that lie further apart, NaN between them."""
    whole = torch.full((rows, width + 5), NAN)
    whole[:, 2 : width + 2] = torch.randn(rows, width)
    return whole[:, 2 : width + 2]


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("library")
def test_rms_norm_matches_torch_and_stays_within_its_rows(width, rows):
    torch.manual_seed(width)
    x, weight, whole = strided(rows, width), torch.rand(width), torch.full((rows, width + 4), NAN)
    out = whole[:, :width]
    assert rms_norm(x, weight, 1e-5, out=out) is out
    expected = rms_norm_reference(x, weight, 1e-5, out=torch.empty(rows, width))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
    assert whole[:, width:].isnan().all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("library")
def test_add_rms_norm_is_the_norm_of_the_exact_sum(width):
    torch.manual_seed(width)
    x, residual, weight = strided(4, width), strided(4, width), torch.rand(width)
    total = x + residual
    normed = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert torch.equal(normed, rms_norm(total, weight, 1e-5))
    # The output may take the place of what was added.
    x.copy_(total - x)
    residual = strided(4, width)
    expected = add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
    assert torch.equal(add_rms_norm(x, residual, weight, 1e-5, out=x), expected)


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("library")
def test_silu_mul_matches_float64(width, rows):
    torch.manual_seed(width)
    gate_up = strided(rows, 2 * width) * 8
    whole = torch.full((rows, width + 4), NAN)
    silu_mul(gate_up, out=whole[:, :width])
    gate, up = gate_up.double().chunk(2, dim=-1)
    torch.testing.assert_close(
        whole[:, :width].double(), gate * gate.sigmoid() * up, atol=1e-6, rtol=1e-6
    )
    assert whole[:, width:].isnan().all()


@pytest.mark.usefixtures("library")
def test_silu_mul_of_extreme_gates():
    gates = [0.0, -0.0, -87.0, -89.0, -1e30, 87.0, 1e30, float("inf"), NAN, -20.0]
    gate_up = torch.tensor([gates + [1.0] * len(gates)])
    wide = torch.tensor([gates], dtype=torch.float64)
    torch.testing.assert_close(
        silu_mul(gate_up), (wide * wide.sigmoid()).float(), atol=1e-30, rtol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "angles"),
    [(1, 1, 2, 1), (4, 2, 64, 32), (3, 1, 80, 16), (9, 3, 66, 33), (2, 2, 128, 20), (5, 1, 10, 3)],
)
@pytest.mark.usefixtures("library")
def test_rotary_kv_write_matches_torch(heads, kv_heads, head_dim, angles, cache_dtype, normed):
    torch.manual_seed(heads + head_dim)
    tokens, block_size = 40, 4
    shape = (tokens // block_size + 2, block_size, kv_heads, head_dim)
    caches = [torch.full(shape, NAN).to(cache_dtype) for _ in range(4)]
    slots = torch.randperm(shape[0] * block_size)[:tokens]
    theta = torch.randn(tokens, angles)
    norms = {"query_norm": None, "key_norm": None, "eps": 0.0}
    if normed:
        norms = {"query_norm": torch.rand(head_dim), "key_norm": torch.rand(head_dim), "eps": 1e-5}
    packed = heads + 2 * kv_heads
    qkv = strided(tokens, packed * head_dim).unflatten(1, (packed, head_dim))
    expected = qkv.clone()
    rotary_kv_write(qkv, *caches[:2], slots, theta.cos(), theta.sin(), **norms)
    rotary_kv_write_reference(expected, *caches[2:], slots, theta.cos(), theta.sin(), **norms)
    torch.testing.assert_close(qkv[:, :heads], expected[:, :heads], atol=2e-6, rtol=2e-6)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[cache_dtype]
    torch.testing.assert_close(caches[0], caches[2], atol=tolerance, rtol=tolerance, equal_nan=True)
    assert torch.equal(caches[1].nan_to_num(), caches[3].nan_to_num())
    untouched = torch.ones(shape[0] * block_size, dtype=torch.bool)
    untouched[slots] = False
    for cache in caches[:2]:
        assert cache.flatten(0, 1)[untouched].isnan().all()


@pytest.mark.usefixtures("library")
def test_values_are_rounded_to_even_in_the_cache():
    value = torch.tensor([1.00390625, 1.01171875, -3e38, 1e-40, float("inf"), NAN])
    qkv = torch.zeros(1, 3, 6)
    qkv[0, 2] = value
    keys, values = (torch.zeros(1, 1, 1, 6, dtype=torch.bfloat16) for _ in range(2))
    angles = torch.zeros(1, 1)
    rotary_kv_write(qkv, keys, values, torch.tensor([0]), angles, angles)
    torch.testing.assert_close(values[0, 0, 0], value.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_rows_are_the_same_bits_alone_and_together_on_any_threads(library):
    torch.manual_seed(0)
    x, weight = torch.randn(200, 576), torch.rand(576)
    gate_up = torch.randn(200, 2 * 1536)
    together = rms_norm(x, weight, 1e-5), silu_mul(gate_up)
    for threads in (1, 3):
        library.set_threads(threads)
        assert torch.equal(rms_norm(x, weight, 1e-5), together[0])
        assert torch.equal(silu_mul(gate_up), together[1])
        for row in (0, 99, 199):
            part = slice(row, row + 1)
            assert torch.equal(rms_norm(x[part], weight, 1e-5), together[0][part])
            assert torch.equal(silu_mul(gate_up[part]), together[1][part])


def test_the_compiled_kernel_is_what_runs(library, monkeypatch):
    calls = []
    monkeypatch.setattr(
        type(library), "run", lambda _, args: calls.append(type(args)), raising=True
    )
    rms_norm(torch.randn(2, 8), torch.ones(8), 1e-5)
    assert calls == [cpu_rms_norm.RmsNormArgs]
    # Other dtypes are for torch.
    rms_norm(torch.randn(2, 8).half(), torch.ones(8).half(), 1e-5)
    assert len(calls) == 1
