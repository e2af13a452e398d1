"""Every position encoding against its formula in NumPy, and the contract of the family."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nn.context import Context
from nn.position import POSITIONS, RoPE
from nn.spec import build

DIM, HEADS, TIME = 8, 2, 6
ROPES = [
    "rope",
    "rope:interleaved=true",
    "rope:fraction=0.5",
    "rope:fraction=0.5:interleaved=true",
    "rope:theta=100:factor=4:original=64",
]
each = pytest.mark.parametrize("spec", [*POSITIONS, *ROPES[1:]])


def make(spec: str):
    torch.manual_seed(0)
    return build(spec, POSITIONS, "position", dim=DIM, seq_len=64).double()


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def at(positions: torch.Tensor) -> Context:
    return Context(torch.zeros_like(positions), positions)


def rotation(x, positions, frequencies, interleaved=False):
    """x (B, T, H, D) turned pair by pair, as complex numbers: z -> z exp(i position frequency)."""
    turned = x.copy()
    for i, frequency in enumerate(frequencies):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + len(frequencies))
        z = (x[..., a] + 1j * x[..., b]) * np.exp(1j * positions * frequency)[..., None]
        turned[..., a], turned[..., b] = z.real, z.imag
    return turned


def frequencies(dim, theta=10000.0):
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def llama3(frequency, factor, low, high, original):
    """The blend of frequencies of Llama 3.1, in wavelengths, case by case."""
    wavelength = 2 * np.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


@each
def test_none_of_them_changes_the_shape(spec):
    position, x, q = make(spec), numbers(2, TIME, DIM), numbers(2, TIME, HEADS, DIM)
    assert position.embed(x, at(torch.arange(TIME))).shape == x.shape
    assert position.rotate(q, at(torch.arange(TIME))).shape == q.shape


@each
def test_positions_of_each_row(spec):
    """(B, T) positions are the (T,) positions of each row, wherever a sequence begins."""
    position, x, q = make(spec), numbers(2, TIME, DIM), numbers(2, TIME, HEADS, DIM)
    rows = torch.stack([torch.arange(TIME), torch.arange(TIME) + 20])
    for part, call in ((x, position.embed), (q, position.rotate)):
        both = call(part, at(rows))
        for row in range(2):
            torch.testing.assert_close(call(part[row : row + 1], at(rows[row])), both[row : row + 1])


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(spec, dtype):
    position, x, q = make(spec), numbers(2, TIME, DIM), numbers(2, TIME, HEADS, DIM)
    where = torch.arange(TIME)
    exact = position.embed(x, at(where)), position.rotate(q, at(where))
    position = position.to(dtype)
    found = position.embed(x.to(dtype), at(where)), position.rotate(q.to(dtype), at(where))
    for y, z in zip(found, exact, strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), z, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.06)


@each
def test_gradients(spec):
    position, where = make(spec), at(torch.arange(TIME))
    x, q = numbers(1, TIME, DIM).requires_grad_(), numbers(1, TIME, HEADS, DIM).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: position.embed(x, where), (x,))
    assert torch.autograd.gradcheck(lambda q: position.rotate(q, where), (q,))


def test_learned():
    position, x = make("learned"), numbers(2, TIME, DIM)
    expected = x.numpy() + position.table.weight.detach().numpy()[3 : 3 + TIME]
    y = position.embed(x, at(torch.arange(3, 3 + TIME)))
    np.testing.assert_allclose(y.detach().numpy(), expected)
    y.sum().backward()
    assert torch.equal(position.table.weight.grad.sum(1) != 0, (torch.arange(64) >= 3) & (torch.arange(64) < 3 + TIME))
    assert position.max_len == 64 and make("rope").max_len is None


def test_sinusoidal():
    x, where = numbers(2, TIME, DIM).numpy(), np.arange(5, 5 + TIME)
    expected = np.zeros((TIME, DIM))
    for i, frequency in enumerate(frequencies(DIM)):
        expected[:, 2 * i], expected[:, 2 * i + 1] = np.sin(where * frequency), np.cos(where * frequency)
    y = make("sinusoidal").embed(torch.from_numpy(x), at(torch.from_numpy(where)))
    np.testing.assert_allclose(y.numpy(), x + expected / np.sqrt(DIM), rtol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("fraction", "dim"), [(1, 8), (0.5, 8), (0.25, 24)])
def test_rope(interleaved, fraction, dim):
    x, where = numbers(2, TIME, HEADS, dim), np.arange(4, 4 + TIME)
    expected = rotation(x.numpy(), where, frequencies(int(dim * fraction)), interleaved)
    rope = make(f"rope:fraction={fraction}:interleaved={interleaved}")
    found = rope.rotate(x, at(torch.from_numpy(where)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[..., int(dim * fraction) :], x[..., int(dim * fraction) :])


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


@pytest.mark.parametrize("spec", ROPES)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
@settings(max_examples=20, deadline=None)
def test_only_the_distance_counts(spec, m, n, shift):
    """<R_m q, R_n k> depends on m - n alone, and turning changes no length."""
    rope, q, k = make(spec), numbers(1, 1, 1, DIM, seed=2), numbers(1, 1, 1, DIM, seed=3)
    turn = lambda x, position: rope.rotate(x, at(torch.tensor([position])))  # noqa: E731
    score = (turn(q, m) * turn(k, n)).sum()
    torch.testing.assert_close((turn(q, m + shift) * turn(k, n + shift)).sum(), score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(turn(q, m).norm(), q.norm())


def test_far_positions_in_float32():
    """At position 100,000 the angle itself is rounded: by less than a hundredth of a radian."""
    rope, q = make("rope"), numbers(1, 1, 1, DIM)
    far = at(torch.tensor([100_000]))
    torch.testing.assert_close(
        rope.rotate(q.float(), far).double(), rope.rotate(q, at(torch.tensor([100_000]))), rtol=0, atol=0.01
    )


@pytest.mark.parametrize(
    ("spec", "argument"),
    [
        ("rope:fraction=0", "fraction"), ("rope:fraction=1.5", "fraction"), ("rope:theta=0", "theta"),
        ("rope:factor=0.5", "factor"),
        ("rope:low=4:high=4", "low"), ("rope:original=0", "original"), ("learned:seq_len=0", "seq_len"),
        ("sinusoidal:theta=-1", "theta"),
    ],
)  # fmt: skip
def test_bad_arguments(spec, argument):
    with pytest.raises(ValueError, match=f"^{argument}: "):
        make(spec)


def test_bad_dimensions():
    with pytest.raises(ValueError, match="^dim: "):
        build("sinusoidal", POSITIONS, "position", dim=7)
    with pytest.raises(ValueError, match="^head_dim: "):
        make("rope").rotate(numbers(1, 1, 1, 7), at(torch.arange(1)))
