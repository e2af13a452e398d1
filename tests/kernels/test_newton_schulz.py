"""What the SPEC does not say: that the result is nearly orthogonal, that the symmetric product is one, what is refused."""

import pytest
import torch

from kernels.launch import use
from kernels.newton_schulz import newton_schulz, symmetric_product
from tests.kernels.contract import interpreted


@pytest.mark.parametrize("shape", [(64, 64), (3, 40, 100), (100, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_one(shape, dtype):
    """0.68 to 1.21 for singular values of at least 0.2 % of the norm, in the directions they had."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    g = u @ torch.diag_embed(torch.linspace(0.01, 1, s.shape[-1], dtype=torch.float64).expand_as(s)) @ v
    x = newton_schulz(g, 5, dtype)
    assert x.dtype == dtype and x.shape == g.shape
    rotated = u.mT @ x.double() @ v.mT
    values = rotated.diagonal(dim1=-2, dim2=-1)
    slack = 0.03 if dtype == torch.bfloat16 else 1e-3
    assert values.min() > 0.68 - slack and values.max() < 1.21 + slack
    assert (rotated - torch.diag_embed(values)).abs().max() < slack


@interpreted
@pytest.mark.parametrize("size", [3, 16, 37, 130])
def test_the_symmetric_product_is_exactly_symmetric(size):
    """Each number above the diagonal is a copy of the one below, in blocks of 16 and of 64."""
    x = torch.randn(2, size, 50, generator=torch.Generator().manual_seed(0))
    with use("triton"):
        gram = symmetric_product(x)
        polynomial = symmetric_product(gram, (2.0, -3.0))
    assert torch.equal(gram, gram.mT) and torch.equal(polynomial, polynomial.mT)
    exact = x.double() @ x.double().mT
    for got, want in ((gram, exact), (polynomial, 2 * exact - 3 * exact @ exact)):
        assert (got - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("g", dict(g=torch.zeros(3))),
        ("g", dict(g=torch.zeros(3, 3, dtype=torch.int64))),
        ("steps", dict(g=torch.zeros(3, 3), steps=-1)),
    ],
)
def test_what_does_not_fit_is_named(name, call):
    with pytest.raises(ValueError, match=f"^{name}: "):
        newton_schulz(**call)
