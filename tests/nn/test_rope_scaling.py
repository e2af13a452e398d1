"""Ways to stretch a trained context: each against its formula in NumPy, and what all have in common."""

import math

import numpy as np
import pytest
import torch

from nn.context import Context
from nn.position import RoPE, rope_scaling

DIM = 8


def frequencies(dim, theta=10000.0):
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


STRETCHES = {
    "linear": rope_scaling.linear,
    "ntk": rope_scaling.ntk,
    "llama3": lambda f, s: rope_scaling.llama3(f, s, original=4096),
    "yarn": lambda f, s: rope_scaling.yarn(f, s, theta=10000.0, original=4096),
    "angle_dist": lambda f, s: rope_scaling.angle_dist(f, s, original=4096),
}


@pytest.mark.parametrize("name", STRETCHES)
def test_a_stretch(name):
    """None for a factor of 1; otherwise none is raised or lowered by more than the factor; the spec gives the function's."""
    plain = torch.from_numpy(frequencies(128))
    assert torch.equal(STRETCHES[name](plain, 1.0), plain)
    found = STRETCHES[name](plain, 4.0)
    assert (found <= plain).all() and (found >= plain / 4 * (1 - 1e-12)).all() and (found < plain).any()
    torch.testing.assert_close(RoPE(scaling=name, factor=4.0, original=4096).frequencies(128), found, rtol=1e-12, atol=0)
    assert torch.equal(RoPE(scaling=name, original=4096).frequencies(128), plain)
    if name != "angle_dist":
        assert (found.diff() < 0).all() and (STRETCHES[name](plain, 8.0) <= found).all()


def llama3(frequency, factor, low, high, original):
    """The blend of frequencies of Llama 3.1, in wavelengths, case by case."""
    wavelength = 2 * np.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


@pytest.mark.parametrize(
    "options", [dict(factor=8.0, low=1.0, high=4.0, original=8192), dict(factor=32.0, low=2.0, high=5.0, original=512)]
)
def test_stretched_rope(options):
    rope = RoPE(theta=500000.0, **options)
    plain = frequencies(64, theta=500000.0)
    expected = np.array([llama3(frequency, **options) for frequency in plain])
    np.testing.assert_allclose(rope.frequencies(64).numpy(), expected, rtol=1e-12)
    assert expected[0] == plain[0] and expected[-1] == plain[-1] / options["factor"]
    assert ((expected < plain) & (expected > plain / options["factor"])).any()


def test_linear_and_ntk():
    plain = frequencies(64)
    np.testing.assert_allclose(rope_scaling.linear(torch.from_numpy(plain), 3.0).numpy(), plain / 3)
    found = rope_scaling.ntk(torch.from_numpy(plain), 3.0).numpy()
    np.testing.assert_allclose(found, frequencies(64, theta=10000 * 3 ** (64 / 62)), rtol=1e-12)
    assert found[0] == plain[0] and math.isclose(found[-1], plain[-1] / 3, rel_tol=1e-12)


def test_yarn():
    """Pairs that turn often are kept, pairs that never turn fully divided, with an even slope between; and the gain."""
    plain, found = frequencies(128), STRETCHES["yarn"](torch.from_numpy(frequencies(128)), 16.0).numpy()
    turns = 4096 * plain / (2 * np.pi)
    first, last = np.flatnonzero(turns >= 32)[-1], np.flatnonzero(turns <= 1)[0]
    assert (first, last) == (20, 46)
    expected = [np.clip((i - first) / (last - first), 0, 1) for i in range(64)]
    np.testing.assert_allclose(found, [(1 - d) * f + d * f / 16 for d, f in zip(expected, plain, strict=True)], rtol=1e-12)
    plain = torch.from_numpy(plain)
    expected = rope_scaling.yarn(plain, 16.0, theta=10000.0, original=4096, beta_slow=2.0, beta_fast=20.0)
    assert torch.equal(RoPE(scaling="yarn", factor=16.0, original=4096, low=2.0, high=20.0).frequencies(128), expected)
    q, position = torch.randn(1, 1, 1, DIM, dtype=torch.float64), RoPE(scaling="yarn", factor=16.0, fraction=0.5)
    turned = position.rotate(q, Context(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)))
    torch.testing.assert_close(turned[..., : DIM // 2], q[..., : DIM // 2] * (0.1 * math.log(16) + 1))
    assert torch.equal(turned[..., DIM // 2 :], q[..., DIM // 2 :])


def shares_of_angles(frequency, length, count, bins=360):
    """NumPy's own histogram of the angles, which also gives the paper's form of the divergence."""
    angle = np.arange(length) * frequency % (2 * np.pi)
    return (np.histogram(angle, bins, (0, 2 * np.pi))[0] + count) / length


@pytest.mark.parametrize(("factor", "cut", "paper_cut"), [(2, 0.72, 0.82), (4, 0.32, 0.355)])
def test_angle_dist(factor, cut, paper_cut):
    """Llama 2's angles: the disturbance falls by 72 % and 32 % as published, or by 82 and 36 with D(Q, P), eps 1e-6."""
    plain, length = frequencies(128), 4096
    chosen = STRETCHES["angle_dist"](torch.from_numpy(plain), float(factor)).numpy()
    published, other, tiny = [], [], np.finfo(np.float16).tiny
    for choice in (plain / factor, chosen):
        sums = np.zeros(2)
        for before, after in zip(plain, choice, strict=True):
            p, q = shares_of_angles(before, length, tiny), shares_of_angles(after, length * factor, tiny)
            sums[0] += (p * np.log(p / q)).sum()
            p, q = shares_of_angles(before, length, 0), shares_of_angles(after, length * factor, 0)
            sums[1] += (q * np.log((q + 1e-6) / (p + 1e-6))).sum()
        published.append(sums[0])
        other.append(sums[1])
        shares = (rope_scaling.angle_shares(torch.from_numpy(f), n) for f, n in ((plain, length), (choice, length * factor)))
        assert math.isclose(rope_scaling.disturbance(*shares).sum(), sums[0], rel_tol=1e-9)
    print(f"x{factor}: {published[0]:.2f} -> {published[1]:.2f}; D(Q, P): {other[0]:.2f} -> {other[1]:.2f}")
    assert abs(1 - published[1] / published[0] - cut) < 0.005 and abs(1 - other[1] / other[0] - paper_cut) < 0.005
    assert ((chosen == plain) | (chosen == plain / factor)).all()
    if factor == 2:
        assert chosen[22] == plain[22] and chosen[6] == plain[6] / 2
