"""Every feed-forward layer against its formula in NumPy, and the contract of the family."""

import math
from functools import partial
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

from kernels.glu import activate
from nn.context import Context
from nn.ffn import FFNS, GLU
from nn.ffn.mlp import MLP
from nn.spec import build

DIM = 6
erf = np.vectorize(math.erf)

FORMULAS = {
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "star_relu": lambda x: (np.maximum(x, 0) ** 2 - 0.5) / math.sqrt(1.25),
    "silu": lambda x: x / (1 + np.exp(-x)),
}
GATES = {name: FORMULAS[name] for name in ("silu", "gelu", "gelu_tanh", "relu")} | {"sigmoid": lambda x: 1 / (1 + np.exp(-x))}
GATES["identity"] = lambda x: x


def mlp(x, p, activation="gelu"):
    return FORMULAS[activation](x @ p["up.weight"].T + p.get("up.bias", 0)) @ p["down.weight"].T + p.get("down.bias", 0)


def glu(x, p, activation="sigmoid"):
    gate, up = (x @ p[f"{part}.weight"].T + p.get(f"{part}.bias", 0) for part in ("gate", "up"))
    return (GATES[activation](gate) * up) @ p["down.weight"].T + p.get("down.bias", 0)


def monarch_matrix(first, second, dim_in, dim_out):
    """By its paths: an input's block and place, the number between the factors, an output's block and place."""
    M, (b, q, _) = np.zeros((dim_out, dim_in)), first.shape
    for i, o, between in np.ndindex(dim_in, dim_out, b * q):
        if between // q == i % b and between % b == o % b:
            M[o, i] += second[o % b, o // b, between // b] * first[i % b, between % q, i // b]
    return M


def monarch(x, p, activation="gelu"):
    width = 4 * DIM
    up, down = (monarch_matrix(p[f"{part}.first"], p[f"{part}.second"], *sizes)
                for part, sizes in (("up", (DIM, width)), ("down", (width, DIM))))  # fmt: skip
    return mlp(x, {**p, "up.weight": up, "down.weight": down}, activation)


REFERENCES = {
    "mlp": mlp, "glu": glu, "swiglu": partial(glu, activation="silu"), "geglu": partial(glu, activation="gelu"),
    "sglu": partial(glu, activation="identity"), "monarch": monarch,
}  # fmt: skip
SPECS = [spec + bias for spec in [*FFNS, "mlp:width=5"] for bias in ("", ":bias=true")]
each = pytest.mark.parametrize("spec", SPECS)


def make(spec: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    ffn = build(spec, FFNS, "ffn", DIM)
    for parameter in ffn.parameters():
        nn.init.normal_(parameter, std=0.5)
    return ffn.to(dtype)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def context(x: torch.Tensor) -> Context:
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1]))


def reference(ffn: nn.Module, spec: str, x: torch.Tensor, **options) -> np.ndarray:
    parameters = {name: parameter.detach().numpy() for name, parameter in ffn.named_parameters()}
    return REFERENCES[spec.partition(":")[0]](x.numpy(), parameters, **options)


def test_everything_has_its_formula_here():
    allowed = [set(get_args(get_type_hints(kind.__init__)["activation"])) for kind in (MLP, GLU)]
    assert REFERENCES.keys() == FFNS.keys() and [FORMULAS.keys(), GATES.keys()] == allowed


@each
def test_formula(spec):
    ffn, x = make(spec), numbers(2, 4, DIM)
    np.testing.assert_allclose(ffn(x, context(x)).detach().numpy(), reference(ffn, spec, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "activation"), [(name, a) for name in ("mlp", "monarch") for a in FORMULAS] + [("glu", a) for a in GATES]
)
def test_activations(name, activation):
    spec = f"{name}:activation={activation}"
    ffn, x = make(spec), numbers(2, 4, DIM)
    if activation == "star_relu":  # as it begins
        with torch.no_grad():
            ffn.scale.fill_(math.sqrt(0.8)), ffn.shift.fill_(-math.sqrt(0.2))
    expected = reference(ffn, spec, x, activation=activation)
    np.testing.assert_allclose(ffn(x, context(x)).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@each
def test_tokens_do_not_meet(spec):
    ffn, x = make(spec), numbers(2, 5, DIM)
    y = ffn(x, context(x))
    torch.testing.assert_close(ffn(x[1:, 3:4], context(x[1:, 3:4])), y[1:, 3:4])
    assert ffn(x[:, :0], context(x[:, :0])).shape == (2, 0, DIM)


@each
def test_gradients(spec):
    ffn, x = make(spec), numbers(2, 3, DIM).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ffn(x, context(x)), (x,))
    (ffn(x, context(x)) * numbers(2, 3, DIM)).sum().backward()
    for name, parameter in ffn.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(spec, dtype):
    x = numbers(2, 4, DIM)
    exact, y = make(spec)(x, context(x)), make(spec, dtype)(x.to(dtype), context(x))
    assert y.dtype == dtype
    assert (y - exact).norm() / exact.norm() < (1e-6 if dtype == torch.float32 else 0.03)


@each
def test_autocast(spec):
    ffn, x = make(spec, torch.float32), numbers(2, 4, DIM).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ffn(x, context(x))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in ffn.parameters())
    exact = make(spec)(x.double(), context(x))
    assert (y - exact).norm() / exact.norm() < 0.03


def test_star_relu_begins_with_mean_0_and_variance_1():
    """Of normal numbers E relu(x)^2 = 1/2 and E relu(x)^4 = 3/2, so that the variance is 5/4 (Yu et al. 2022, section 3.2)."""
    ffn = build("mlp:activation=star_relu", FFNS, "ffn", DIM).double()
    x = torch.randn(10**6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = activate(x, ffn.scale, ffn.shift, activation="star_relu")
    assert abs(y.mean()) < 0.01 and abs(y.var() - 1) < 0.02
    assert (ffn.scale.item(), ffn.shift.item()) == pytest.approx((0.8944, -0.4472), abs=1e-4)


def test_geglu_approximate():
    ffn, x = make("geglu:approximate=true"), numbers(2, 4, DIM)
    torch.testing.assert_close(ffn(x, context(x)), make("glu:activation=gelu_tanh")(x, context(x)))


def test_widths():
    assert build("mlp", FFNS, "ffn", 48).up.weight.shape == (4 * 48, 48)
    assert build("swiglu", FFNS, "ffn", 768).gate.weight.shape == (2048, 768)  # 8/3 of 768
    assert build("swiglu", FFNS, "ffn", 256).gate.weight.shape == (704, 256)  # 682.7 up to a multiple of 64
    counts = [sum(p.numel() for p in build(name, FFNS, "ffn", 768).parameters()) for name in ("mlp", "swiglu")]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", FFNS)
@pytest.mark.parametrize("width", [0, -3])
def test_bad_arguments(name, width):
    with pytest.raises(ValueError, match=f"^width: {width} is too small"):
        make(f"{name}:width={width}")
