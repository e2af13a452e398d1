"""Rotary position embedding: what its SPEC does not say."""

import math

import pytest
import torch

from kernels.launch import use
from kernels.rope import angles, rope
from tests.kernels.contract import interpreted

PATHS = ["torch", pytest.param("triton", marks=interpreted)]
x, table = torch.zeros(2, 3, 4, 6), torch.zeros(3, 3)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("x", dict(x=torch.zeros(3, 4, 6))),
        ("x", dict(x=x.long())),
        ("cos", dict(cos=torch.zeros(2, 3))),
        ("cos", dict(cos=torch.zeros(3))),
        ("cos", dict(cos=torch.zeros(3, 3, 3))),
        ("cos", dict(cos=torch.zeros(3, 4))),
        ("cos", dict(cos=torch.zeros(3, 0))),
        ("cos", dict(cos=torch.zeros(3, 3, dtype=torch.int64))),
        ("sin", dict(sin=torch.zeros(3, 3, requires_grad=True))),
        ("sin", dict(sin=torch.zeros(3, 2))),
        ("sin", dict(sin=torch.zeros(2, 3, 3))),
    ],
)
def test_what_does_not_fit_is_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        rope(**{"x": x, "cos": table, "sin": table, **arguments})


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("positions", dict(positions=torch.tensor(3))),
        ("positions", dict(positions=torch.zeros(1, 2, 3, dtype=torch.int64))),
        ("frequencies", dict(frequencies=torch.ones(2, 2))),
        ("frequencies", dict(frequencies=torch.ones(2, dtype=torch.int64))),
    ],
)
def test_what_makes_no_angles_is_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        angles(**{"positions": torch.arange(3), "frequencies": torch.ones(2), **arguments})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_position_multiplies_by_a_complex_number(path, interleaved):
    """Pair i of a token at position p, as a complex number, times e^(i p f): forward; and of its conjugate: backward."""
    positions, frequencies = torch.tensor([[0, 7, 3], [1, 2, 100], [5, 5, 9]]), torch.tensor([1.0, 0.3, -0.01, 0.0])
    x, dy = (torch.randn(3, 3, 5, 8) for _ in range(2))
    turn = torch.polar(torch.ones(()), (positions[..., None] * frequencies))[:, :, None]

    def times(x, turn):
        z = x.unflatten(-1, (4, 2)) if interleaved else x.unflatten(-1, (2, 4)).mT
        z = torch.view_as_real(torch.complex(z[..., 0], z[..., 1]) * turn)
        return (z if interleaved else z.mT).flatten(-2)

    x.requires_grad_()
    with use(path):
        y = rope(x, *angles(positions, frequencies), interleaved=interleaved)
        (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(y, times(x, turn), rtol=0, atol=2e-5)
    torch.testing.assert_close(dx, times(dy, turn.conj()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_the_distance_alone(path, interleaved):
    """The reason for it: q at m and k at n have the product of q at m + 50 and k at n + 50 (eq. 16)."""
    frequencies = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    q, k = torch.randn(1, 1, 2, 40), torch.randn(1, 1, 2, 40)
    with use(path):

        def product(m, n):
            at = (angles(torch.tensor([p]), frequencies) for p in (m, n))
            a, b = (rope(v, *table, interleaved=interleaved) for v, table in zip((q, k), at, strict=True))
            return (a * b).sum(-1)

        torch.testing.assert_close(product(3, 10), product(53, 60), rtol=0, atol=1e-5)
        assert (product(3, 10) - product(3, 11)).abs().min() > 1e-3


def test_angles_are_exact_at_any_position():
    """To one rounding of float32, where a float32 product of position and frequency is off by 0.03."""
    positions, frequencies = torch.tensor([0, 1, 99_999, 1_000_003]), torch.tensor([1.0, 0.7, 1e-3], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        cos, sin = angles(positions, frequencies, dtype)
        assert cos.dtype == sin.dtype == dtype and cos.shape == sin.shape == (4, 3)
        for t, p in enumerate(positions.tolist()):
            for i, f in enumerate(frequencies.tolist()):
                assert abs(cos[t, i] - math.cos(p * f)) <= torch.finfo(dtype).eps
                assert abs(sin[t, i] - math.sin(p * f)) <= torch.finfo(dtype).eps
    assert angles(positions.expand(2, 4), frequencies)[0].shape == (2, 4, 3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_part_of_a_joint_projection_is_read_where_it_lies(path, interleaved):
    """Queries cut out of (B, T, queries + keys): rows of other distances, odd ones too; the rest is copied."""
    joint = torch.randn(3, 9, 4 * 11 + 5)
    part = joint[..., 2 : 2 + 44].unflatten(-1, (4, 11))
    cos, sin = angles(torch.arange(9), torch.rand(4))
    with use(path):
        y = rope(part, cos, sin, interleaved=interleaved)
        assert torch.equal(y, rope(part.contiguous(), cos, sin, interleaved=interleaved))
        assert torch.equal(y[..., 8:], part[..., 8:])
        turned_back = rope(y, cos, -sin, interleaved=interleaved)
    torch.testing.assert_close(turned_back, part)
    torch.testing.assert_close(y.norm(dim=-1), part.norm(dim=-1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_last_of_three_coordinates_passes_through(path, interleaved):
    x = torch.randn(2, 3, 4, 3)
    with use(path):
        y = rope(x, *angles(torch.arange(3), torch.ones(1)), interleaved=interleaved)
    assert y.shape == x.shape and torch.equal(y[..., 2], x[..., 2])
    assert torch.equal(y[:, 0], x[:, 0]) and not torch.equal(y[:, 1:, :, :2], x[:, 1:, :, :2])
