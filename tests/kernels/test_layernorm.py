"""Layer normalisation: what its SPEC does not say."""

import pytest
import torch
import torch.nn.functional as F

from kernels.launch import row_tiles, use
from kernels.layernorm import layer_norm
from tests.kernels.contract import interpreted

PATHS = ["torch", pytest.param("triton", marks=interpreted)]


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("x", dict(x=torch.zeros(()))),
        ("x", dict(x=torch.zeros(2, 4, dtype=torch.int64))),
        ("x", dict(x=torch.zeros(2, 0))),
        ("x", dict(x=torch.zeros(1, 65537))),
        ("weight", dict(x=torch.zeros(2, 4), weight=torch.zeros(3))),
        ("weight", dict(x=torch.zeros(2, 4), weight=torch.zeros(4, dtype=torch.int64))),
        ("bias", dict(x=torch.zeros(2, 4), bias=torch.zeros(2, 4))),
        ("eps", dict(x=torch.zeros(2, 4), eps=-1e-9)),
    ],
)
def test_what_does_not_fit_is_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        layer_norm(**arguments)


def test_the_widest_row_and_no_eps_are_taken():
    x = torch.randn(1, 65536)
    torch.testing.assert_close(layer_norm(x, eps=0), F.layer_norm(x, (65536,), eps=0))
    assert layer_norm(torch.randn(3, 1)).abs().max() == 0  # a row of one number is its own mean


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("C", [48, 100])
@pytest.mark.parametrize("x_dtype, dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_parameters_of_another_dtype(path, C, x_dtype, dtype):
    """Float32 parameters with bfloat16 rows, and the reverse: each gradient in the dtype of what it is for."""
    x = torch.randn(20, C).to(x_dtype).requires_grad_()
    weight, bias = (torch.randn(C).to(dtype).requires_grad_() for _ in range(2))
    dy = torch.randn(20, C).to(x_dtype)
    with use(path):
        y = layer_norm(x, weight, bias)
        got = y, *torch.autograd.grad(y, (x, weight, bias), dy)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = F.layer_norm(exact[0], (C,), *exact[1:])
    want = y, *torch.autograd.grad(y, exact, dy.double())
    for g, w, d in zip(got, want, (x_dtype, x_dtype, dtype, dtype), strict=True):
        assert g.dtype == d
        torch.testing.assert_close(g.double(), w, rtol=2 * torch.finfo(d).eps, atol=1e-4 if d == torch.float32 else 1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_a_mean_far_from_zero_costs_no_digits(path):
    """Rows about 1000 with deviations of 1: the square of the mean would swallow them. Several tiles, one cut off."""
    x = 1000 + torch.randn(4, 90, dtype=torch.float64)
    x = x.float()
    with use(path):
        y = layer_norm(x)
    want = F.layer_norm(x.double(), (90,))
    assert (y - want).abs().max() < 3e-4  # one rounding of the mean, 6e-5 of a deviation, and a few more
    assert (y.mean(-1).abs() < 1e-4).all()


@pytest.mark.parametrize("path", PATHS)
def test_statistics_of_half_precision_rows_are_float32(path):
    """Kept in bfloat16 for the backward pass, as PyTorch does, they would cost the gradient two digits."""
    x = (5 + torch.randn(24, 96)).bfloat16().requires_grad_()
    dy = torch.randn(24, 96).bfloat16()
    with use(path):
        (got,) = torch.autograd.grad(layer_norm(x), x, dy)
    exact = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(F.layer_norm(exact, (96,)), exact, dy.double())
    assert (got - want).abs().max() <= torch.finfo(torch.bfloat16).eps * want.abs().max()


def test_every_width_is_covered_by_its_tiles():
    for C in [1, 31, 32, 33, 63, 64, 65, 100, 4096, 65536]:
        tiles = row_tiles(C, 16384)
        assert (tiles["TILES"] - 1) * tiles["BLOCK"] < C <= tiles["TILES"] * tiles["BLOCK"]
        assert tiles["BLOCK"] & (tiles["BLOCK"] - 1) == 0 < tiles["ROWS"]
