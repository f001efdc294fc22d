"""Normalisation, rotary embedding and the gated activation against float64 formulas."""

import pytest
import torch

from kvrelay_kernels.rms_norm import add_rms_norm, rms_norm
from kvrelay_kernels.rotary import apply_rotary
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("head_dim", "angles"), [(2, 1), (8, 4), (10, 3)])
def test_rotary_rotates_pairs_in_place_and_leaves_the_rest(head_dim, angles, dtype):
    torch.manual_seed(0)
    fused = torch.randn(5, 6, head_dim).to(dtype)
    query, key, value = fused[:, :3], fused[:, 3:5], fused[:, 5:]
    before = fused.clone().double()
    theta = torch.randn(5, angles)
    apply_rotary(query, key, theta.cos(), theta.sin())
    pairs = torch.complex(before[..., :angles], before[..., angles : 2 * angles])
    turned = pairs * torch.polar(torch.ones_like(theta), theta).unsqueeze(1)
    expected = before.clone()
    expected[:, :5, :angles], expected[:, :5, angles : 2 * angles] = (
        turned.real[:, :5],
        turned.imag[:, :5],
    )
    close(fused, expected, dtype)
    assert torch.equal(value.double(), before[:, 5:])


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
    with pytest.raises(ValueError, match="sin"):
        apply_rotary(x, x, torch.zeros(2, 2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="too many"):
        apply_rotary(x, x, torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="cos has dtype"):
        apply_rotary(x, x, torch.zeros(2, 2).half(), torch.zeros(2, 2))
