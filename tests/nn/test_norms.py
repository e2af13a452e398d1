"""Every norm against its formula in NumPy, and the contract of the family."""

import numpy as np
import pytest
import torch
from torch import nn

from nn.norm import NORMS
from nn.spec import build

DIM = 12


def layernorm(x, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def rmsnorm(x, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


FORMULAS = {"layernorm": layernorm, "rmsnorm": rmsnorm}
each = pytest.mark.parametrize("name", NORMS)


def make(spec: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    norm = build(spec, NORMS, "norm", DIM)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.to(dtype)


def numbers(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1


def test_every_norm_has_its_formula_here():
    assert FORMULAS.keys() == NORMS.keys()


@each
@pytest.mark.parametrize("eps", [None, 0.5])
@pytest.mark.parametrize("shape", [(DIM,), (2, 5, DIM), (0, 3, DIM)])
def test_formula(name, eps, shape):
    norm, x = make(name if eps is None else f"{name}:eps={eps}"), numbers(*shape)
    expected = FORMULAS[name](x.numpy(), **({} if eps is None else dict(eps=eps)))
    expected = expected * norm.weight.detach().numpy()
    if getattr(norm, "bias", None) is not None:
        expected = expected + norm.bias.detach().numpy()
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@each
def test_bare(name):
    """Without gain (and bias) there is nothing to learn, and only the formula is left."""
    norm, x = make(f"{name}:gain=false" + (":bias=false" if name == "layernorm" else "")), numbers(4, DIM)
    assert not list(norm.parameters())
    np.testing.assert_allclose(norm(x).numpy(), FORMULAS[name](x.numpy()), rtol=1e-12, atol=1e-12)


@each
def test_begins_as_the_bare_formula(name):
    x = numbers(4, DIM)
    np.testing.assert_allclose(build(name, NORMS, "norm", DIM).double()(x).detach().numpy(), FORMULAS[name](x.numpy()))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(name, dtype):
    y = make(name, dtype)(numbers(4, DIM).to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), make(name)(numbers(4, DIM)), atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)


@each
def test_gradients(name):
    norm, x = make(name), numbers(3, DIM).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))
    (norm(x) * numbers(3, DIM)).sum().backward()
    assert all(p.grad.isfinite().all() and (p.grad != 0).all() for p in norm.parameters())


@each
def test_scale_does_not_matter(name):
    norm, x = make(f"{name}:eps=0"), numbers(4, DIM)
    torch.testing.assert_close(norm(1000 * x), norm(x))


@each
def test_zeros_stay_finite(name):
    assert make(name)(torch.zeros(2, DIM, dtype=torch.float64)).isfinite().all()


@each
def test_bad_arguments(name):
    with pytest.raises(ValueError, match="^eps: -1.0 is too small"):
        make(f"{name}:eps=-1")
