"""Activations, plain and gated: what their SPECs do not say."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.glu import GATES, NAMES, activate, glu, value_and_slope
from kernels.launch import use
from tests.kernels.contract import interpreted

PATHS = ["torch", pytest.param("triton", marks=interpreted)]
x = torch.zeros(2, 4)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("gate", dict(gate=torch.zeros(()))),
        ("gate", dict(gate=x.long(), up=x.long())),
        ("gate", dict(gate=torch.zeros(2, 3))),
        ("up", dict(gate=x, up=torch.zeros(4))),
        ("up", dict(gate=x, up=x.double())),
        ("activation", dict(gate=x, up=x, activation="relu2")),
    ],
)
def test_what_glu_cannot_take_is_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        glu(**{"activation": "silu", **arguments})


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("x", dict(x=x.long())),
        ("activation", dict(activation="mish")),
        ("scale", dict(scale=2.0)),
        ("bias", dict(bias=torch.zeros(1))),
        ("scale", dict(activation="star_relu", scale=torch.ones(2))),
        ("bias", dict(activation="star_relu", bias=torch.ones(0))),
    ],
)
def test_what_activate_cannot_take_is_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        activate(**{"x": x, "activation": "silu", **arguments})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["halves", "transposed", "mixed"])
def test_rows_that_lie_apart(path, layout):
    """Halves of one tensor, as a joint projection makes them, are taken where they lie; what has no rows is copied."""
    both = torch.randn(5, 3, 2 * 40)
    gate, up = both.chunk(2, -1)
    if layout != "halves":
        gate = torch.randn(40, 3, 5).permute(2, 1, 0)
    if layout == "transposed":
        up = torch.randn(40, 3, 5).permute(2, 1, 0)
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    dy = torch.randn(3, 5, 40).transpose(0, 1)
    with use(path):
        y = glu(gate, up, activation="silu")
        got = y, *torch.autograd.grad(y, (gate, up), dy)
    want = F.silu(gate) * up
    torch.testing.assert_close(got, (want, *torch.autograd.grad(want, (gate, up), dy)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", GATES)
def test_packed_is_the_same_as_apart(path, activation):
    both = torch.randn(3, 7, 2 * 1030, requires_grad=True)
    dy = torch.randn(3, 7, 1030)
    with use(path):
        y, z = glu(both, activation=activation), glu(*both.chunk(2, -1), activation=activation)
        assert torch.equal(y, z)
        assert torch.equal(*(torch.autograd.grad(r, both, dy)[0] for r in (y, z)))


def exact(points: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """f and f' by PyTorch in float64."""
    x = points.detach().double().requires_grad_()
    f = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu2": lambda x: F.relu(x) ** 2,
         "star_relu": lambda x: math.sqrt(0.8) * F.relu(x) ** 2 - math.sqrt(0.2)}.get(activation)  # fmt: skip
    y = (f or getattr(F, activation))(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


NEAR = torch.linspace(-4, 4, 33)  # zero is one of them
FAR = torch.tensor([-1e4, -90.0, -20.0, 20.0, 90.0, 1e4])


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("activation", NAMES)
def test_the_equations_are_pytorchs(activation):
    if activation != "star_relu":
        got = value_and_slope(NEAR.double().numpy(), activation)
        torch.testing.assert_close(tuple(map(torch.from_numpy, got)), exact(NEAR, activation), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_zero_and_far_from_it(path, activation, dtype):
    """No infinity times zero far out, no slope at zero where there is a corner, and NaN stays NaN."""
    points = torch.cat([NEAR, FAR]).to(dtype).requires_grad_()
    up = torch.full_like(points, 3.0).requires_grad_()
    value, slope = exact(points, activation)
    close = dict(rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)  # PyTorch's own gelu needs 8
    with use(path):
        y = activate(points, activation=activation)
        torch.testing.assert_close(y.double(), value, **close)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), points)[0].double(), slope, **close)
        if activation in GATES:
            y = glu(points, up, activation=activation)
            torch.testing.assert_close(y.double(), 3 * value, **close)
            for got, want in zip(torch.autograd.grad(y.sum(), (points, up)), (3 * slope, value), strict=True):
                torch.testing.assert_close(got.double(), want, **close)
        assert activate(torch.full((3,), math.nan, dtype=dtype), activation=activation).isnan().all()


@pytest.mark.parametrize("path", PATHS)
def test_star_relu_by_default_keeps_normal_numbers_normal(path):
    with use(path):
        y = activate(torch.randn(60_000), activation="star_relu")
        assert abs(y.mean()) < 0.02 and abs(y.std() - 1) < 0.04
        numbers = activate(x + 3, 2.0, 0.5, activation="star_relu")
        learned = activate(x + 3, torch.tensor(2.0), torch.tensor([0.5]), activation="star_relu")
    assert torch.equal(numbers, learned) and (numbers == 18.5).all()


def test_relu2_keeps_nothing_of_what_a_gradient_overwrites():
    """The square is taken in place where that is allowed: the input must not change, nor the output in the backward pass."""
    for dtype in (torch.float32, torch.bfloat16):
        start = torch.randn(100).to(dtype)
        values = start.clone().requires_grad_()
        y = activate(values, activation="relu2")
        before = y.detach().clone()
        y.backward(torch.ones_like(y))
        assert torch.equal(values.detach(), start) and torch.equal(y.detach(), before)
        torch.testing.assert_close(values.grad, 2 * F.relu(start))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_of_no_axes_keeps_its_dtype(dtype):
    """Beside a scale of no axes either, PyTorch would widen it."""
    y = activate(torch.tensor(-2.0, dtype=dtype), activation="star_relu")
    assert y.shape == () and y.dtype == dtype and y.item() == pytest.approx(-0.4472, abs=1e-2)
