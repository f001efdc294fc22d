"""Normalisation, rotary embedding and the gated activation against float64 formulas."""

import pytest
import torch

from kvrelay_kernels.rms_norm import add_rms_norm, rms_norm
from kvrelay_kernels.rotary_kv_write import rotary_kv_write
from kvrelay_kernels.silu_mul import silu_mul

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def close(actual, expected, dtype):
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 96)])
def test_rms_norm(shape, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    close(rms_norm(x, weight, 1e-6), expected, dtype)


def test_rms_norm_of_large_half_precision_values_does_not_overflow():
    x = torch.full((1, 8), 60000.0, dtype=torch.float16)
    assert rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-6).tolist() == [[1.0] * 8]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_add_rms_norm_leaves_the_sum_in_the_residual(dtype):
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(4, 6).to(dtype) for _ in range(3))
    weight = weight[0]
    total = x + residual
    normed = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert torch.equal(normed, rms_norm(total, weight, 1e-5))


def caches(tokens, kv_heads, head_dim, dtype):
    """Poisoned caches, and distinct slots of them."""
    shape = (tokens + 2, 2, kv_heads, head_dim)
    key, value = (torch.full(shape, float("nan")).to(dtype) for _ in range(2))
    return key, value, torch.randperm(2 * (tokens + 2))[:tokens]


def rotated(x, theta):
    angles = theta.shape[1]
    pairs = torch.complex(x[..., :angles], x[..., angles : 2 * angles])
    turned = pairs * torch.polar(torch.ones_like(theta), theta).unsqueeze(1)
    return torch.cat((turned.real, turned.imag, x[..., 2 * angles :]), dim=-1)


@pytest.mark.parametrize("cache_dtype", TOLERANCE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("head_dim", "angles"), [(2, 1), (8, 4), (10, 3)])
def test_rotary_turns_pairs_leaves_the_rest_and_fills_the_slots(
    head_dim, angles, dtype, cache_dtype
):
    torch.manual_seed(0)
    qkv = torch.randn(5, 7, head_dim).to(dtype)
    before, theta = qkv.double(), torch.randn(5, angles)
    key_cache, value_cache, slots = caches(5, 2, head_dim, cache_dtype)
    rotary_kv_write(qkv, key_cache, value_cache, slots, theta.cos(), theta.sin())
    expected = rotated(before[:, :5], theta.double())
    close(qkv[:, :3], expected[:, :3], dtype)
    wider = max(dtype, cache_dtype, key=TOLERANCE.get)
    keys, values = (cache.flatten(0, 1) for cache in (key_cache, value_cache))
    close(keys[slots].to(wider), expected[:, 3:], wider)
    assert torch.equal(values[slots], before[:, 5:].to(cache_dtype))
    untouched = torch.ones(len(keys), dtype=torch.bool)
    untouched[slots] = False
    assert keys[untouched].isnan().all()
    assert values[untouched].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_heads_are_normalised_before_the_rotation(dtype):
    torch.manual_seed(0)
    qkv, theta = torch.randn(4, 6, 16).to(dtype), torch.randn(4, 8)
    query_norm, key_norm = torch.rand(16).to(dtype), torch.rand(16).to(dtype)
    key_cache, value_cache, slots = caches(4, 1, 16, dtype)
    query, key = qkv[:, :4].double(), qkv[:, 4:5].double()
    rotary_kv_write(
        qkv,
        key_cache,
        value_cache,
        slots,
        theta.cos(),
        theta.sin(),
        query_norm=query_norm,
        key_norm=key_norm,
        eps=1e-5,
    )
    for actual, x, weight in (
        (qkv[:, :4], query, query_norm),
        (key_cache.flatten(0, 1)[slots], key, key_norm),
    ):
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        close(actual, rotated(normed, theta.double()), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_mul(dtype):
    torch.manual_seed(0)
    gate_up = torch.randn(3, 14).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(silu_mul(gate_up), gate * gate.sigmoid() * up, dtype)


def test_wrong_shapes_are_named():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"weight has shape \[3\], expected \[4\]"):
        rms_norm(x, torch.zeros(3), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, torch.zeros(2, 4), torch.zeros(4), 1e-6)
    with pytest.raises(ValueError, match="odd"):
        silu_mul(torch.zeros(2, 3))
    key, value, slots = caches(2, 1, 4, torch.float32)
    for angles, sines, message in ((2, 1, "sin"), (3, 3, "too many")):
        with pytest.raises(ValueError, match=message):
            rotary_kv_write(x, key, value, slots, torch.zeros(2, angles), torch.zeros(2, sines))
    with pytest.raises(ValueError, match="cos has dtype"):
        rotary_kv_write(x, key, value, slots, torch.zeros(2, 2).half(), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="too few for 2 KV heads"):
        rotary_kv_write(x, *caches(2, 2, 4, torch.float32), torch.zeros(2, 2), torch.zeros(2, 2))
