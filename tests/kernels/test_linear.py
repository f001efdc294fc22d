"""Packed projections against float64, in every storage format, and the same bits in every batch."""

import pytest
import torch

from kvrelay_kernels.cpu.library import cpu_library
from kvrelay_kernels.linear import activation_dtype, linear, pack_linear
from kvrelay_kernels.reference.linear import (
    linear_reference,
    quantise_int8_reference,
    quantise_int16_reference,
)

CPU = torch.device("cpu")
FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
# (outputs, width, rows): around tiles of 32 outputs, blocks of 256 and 512 inputs, and row blocks.
SHAPES = [
    (1, 2, 1),
    (31, 64, 2),
    (70, 62, 3),
    (33, 1030, 13),
    (256, 128, 49),
    (100, 1536, 97),
    (520, 510, 200),
]
# Of the products alone, beside float64 over the weights as they are stored.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 2e-6,
    torch.float16: 2e-6,
    torch.int8: 1e-4,
    torch.int16: 2e-4,
}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def library(request):
    library = cpu_library()
    if library is None:
        pytest.skip("no C++ compiler here")
    before = library.threads
    library.set_threads(request.param)
    yield library
    library.set_threads(before)


def relative_error(found, expected):
    assert found.isfinite().all()
    return ((found.double() - expected).norm() / expected.norm()).item()


def stored(weight, dtype):
    """What `dense()` of packed weights should be."""
    quantise = {torch.int8: quantise_int8_reference, torch.int16: quantise_int16_reference}
    return quantise[dtype](weight)[0] if dtype in quantise else weight.to(dtype)


def represented(weight, dtype):
    """The float64 numbers that weights stored in `dtype` stand for."""
    if dtype == torch.int8:
        integers, scale = quantise_int8_reference(weight)
        return integers.double() * scale.double().unsqueeze(1)
    if dtype == torch.int16:
        integers, scale = quantise_int16_reference(weight)
        wide = scale.double().repeat_interleave(64, 1)[:, : weight.shape[1]]
        return integers.double() * wide
    return weight.to(dtype).double()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("outputs", "width", "rows"), SHAPES)
def test_products_match_float64(library, outputs, width, rows, dtype):
    weight, x, bias = torch.randn(outputs, width), torch.randn(rows, width), torch.randn(outputs)
    parts = [part.contiguous() for part in weight.split(outputs // 3 + 1)]
    weights = pack_linear(parts, device=CPU, dtype=dtype, bias=bias)
    assert torch.equal(weights.dense(), stored(weight, weights.dtype))
    exact = represented(weight, weights.dtype)
    out = torch.full((rows, outputs), float("nan"))
    assert linear(x, weights, out=out) is out
    # Beside what the terms of a sum amount to: of two that nearly cancel, little is left to compare with.
    terms = (x.double().square() @ exact.T.square() + bias.double().square()).sqrt()
    error = (out.double() - (x.double() @ exact.T + bias.double())).norm() / terms.norm()
    assert error < TOLERANCE[weights.dtype]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_row_is_the_same_bits_in_every_batch(library, dtype):
    weights = pack_linear([torch.randn(130, 1100)], device=CPU, dtype=dtype)
    x = torch.randn(210, 1100)
    together = linear(x, weights)
    library.set_threads(3 - library.threads)
    for size in (1, 2, 3, 5, 7, 11, 12, 13, 47, 48, 49, 96, 100):
        assert torch.equal(linear(x[60 : 60 + size], weights), together[60 : 60 + size]), size


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_rows_may_be_strided(library, dtype):
    weights = pack_linear([torch.randn(40, 64)], device=CPU, dtype=dtype)
    x = torch.randn(9, 100)[:, 7:71]
    wide = torch.full((9, 64), float("nan"))
    linear(x, weights, out=wide[:, 10:50])
    assert torch.equal(wide[:, 10:50], linear(x.contiguous(), weights))
    assert wide[:, :10].isnan().all()
    assert wide[:, 50:].isnan().all()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(library, dtype, bad):
    weights = pack_linear([torch.randn(40, 600)], device=CPU, dtype=dtype)
    x = torch.randn(3, 600)
    x[1, 5] = bad
    out = linear(x, weights)
    assert out[[0, 2]].isfinite().all()
    assert not out[1].isfinite().any()


def test_zeros_stay_zeros(library):
    weights = pack_linear([torch.zeros(40, 64)], device=CPU, dtype=torch.int8)
    assert torch.equal(linear(torch.randn(3, 64), weights), torch.zeros(3, 40))
    weights = pack_linear([torch.randn(40, 64)], device=CPU, dtype=torch.int8)
    assert torch.equal(linear(torch.zeros(3, 64), weights), torch.zeros(3, 40))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_checkpoint_format_is_packed_alike(library, source):
    weight = torch.randn(50, 96).to(source)
    for dtype in FORMATS:
        weights = pack_linear([weight], device=CPU, dtype=dtype)
        assert torch.equal(weights.dense(), stored(weight, weights.dtype))


def spiky(*shape):
    """Normal numbers with one in a hundred a hundred times as large, as activations of real models have."""
    values = torch.randn(*shape)
    return torch.where(torch.rand(*shape) < 0.01, values * 100, values)


@pytest.mark.parametrize("make", [torch.randn, spiky])
def test_bfloat16_weights_lose_less_than_bfloat16_activations_would(library, make):
    weight, x = (make(300, 1100) / 33).bfloat16(), make(60, 1100)
    exact = x.double() @ weight.double().T
    rounded = x.bfloat16().double() @ weight.double().T
    ours = linear(x, pack_linear([weight], device=CPU, dtype=torch.bfloat16))
    assert relative_error(ours, exact) < 0.7 * relative_error(rounded, exact)


def test_the_largest_sums_of_a_block_do_not_overflow(library):
    for dtype in (torch.bfloat16, torch.int8):
        weights = pack_linear([torch.full((40, 1024), -3.0)], device=CPU, dtype=dtype)
        out = linear(torch.full((3, 1024), 7.0), weights)
        torch.testing.assert_close(out, torch.full((3, 40), -21504.0))


def test_bfloat16_is_stored_as_integers_only_where_that_is_faster(library, monkeypatch):
    weight, x = torch.randn(70, 130), torch.randn(20, 130)
    for prefers, dtype in ((True, torch.int16), (False, torch.bfloat16)):
        monkeypatch.setitem(vars(library), "prefers_int16", prefers)
        weights = pack_linear([weight], device=CPU, dtype=torch.bfloat16)
        assert weights.dtype == dtype
        assert torch.equal(weights.dense(), stored(weight, dtype))
        out = linear(x, weights)
        assert relative_error(out, x.double() @ represented(weight, dtype).T) < TOLERANCE[dtype]


def test_no_rows_are_no_work(library):
    weights = pack_linear([torch.randn(50, 96)], device=CPU, dtype=torch.bfloat16)
    assert linear(torch.empty(0, 96), weights).shape == (0, 50)


def test_shapes_that_do_not_fit_are_refused():
    weights = pack_linear([torch.randn(50, 96)], device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x has shape \[3, 95\], expected \[\*, 96\]"):
        linear(torch.randn(3, 95), weights)
    with pytest.raises(ValueError, match=r"out has shape \[3, 49\], expected \[3, 50\]"):
        linear(torch.randn(3, 96), weights, out=torch.empty(3, 49))
    with pytest.raises(ValueError, match="bias has shape"):
        pack_linear([torch.randn(50, 96)], device=CPU, dtype=torch.int8, bias=torch.ones(49))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_an_odd_width_goes_through_torch(dtype):
    weight, bias = torch.randn(50, 95), torch.randn(50)
    x = torch.randn(3, 95).to(activation_dtype(CPU, dtype))
    weights = pack_linear([weight], device=CPU, dtype=dtype, bias=bias.to(x.dtype))
    assert weights.library is None
    expected = linear_reference(x, weights.data, weights.scale, weights.bias)
    torch.testing.assert_close(linear(x, weights), expected)
    torch.testing.assert_close(
        linear(x, weights).float(), x.float() @ weight.T + bias, atol=0.5, rtol=0.1
    )


def test_activations_are_float32_where_the_kernels_run(library):
    assert activation_dtype(CPU, torch.bfloat16) == torch.float32
    assert activation_dtype(torch.device("cuda"), torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("outputs", [1, 32, 70])
def test_some_rows_are_those_of_all(dtype, outputs):
    weight = torch.randn(outputs, 62, generator=torch.Generator().manual_seed(1))
    weights = pack_linear([weight], device=CPU, dtype=dtype)
    every = weights.dense()
    for first in {0, min(31, outputs - 1), min(33, outputs - 1)}:
        for end in {first + 1, min(first + 32, outputs), outputs}:
            assert torch.equal(weights.rows(first, end), every[first:end])
