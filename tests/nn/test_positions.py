"""Every position encoding against its formula in NumPy, and the contract of the family."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nn.attention import GQA
from nn.context import Context
from nn.position import POSITIONS
from nn.spec import build

DIM, HEADS, TIME = 8, 2, 6
ROPES = [
    "rope",
    "rope:interleaved=true",
    "rope:fraction=0.5",
    "rope:fraction=0.5:interleaved=true",
    "rope:theta=100:factor=4:original=64",
    "rope:theta=100:factor=4:original=64:scaling=yarn",
    "rope:theta=100:factor=4:original=64:scaling=angle_dist:fraction=0.5",
    "rope:scaling=linear:factor=2.5",
    "rope:scaling=ntk:factor=8:interleaved=true",
]
each = pytest.mark.parametrize("spec", [*POSITIONS, *ROPES[1:], "t5:buckets=6:max_distance=4"])


def make(spec: str):
    torch.manual_seed(0)
    return build(spec, POSITIONS, "position", dim=DIM, heads=HEADS, seq_len=64).double()


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


@each
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_added_to_scores(spec, causal):
    """Slopes above 0 for each head; a bias of which the last queries are the last rows, made once a call."""
    position, where = make(spec), at(torch.arange(TIME))
    where.causal = causal
    slopes, bias = position.slopes(HEADS), position.bias(where, HEADS, TIME, TIME)
    assert slopes is None or (slopes.shape == (HEADS,) and slopes.dtype == torch.float32 and (slopes > 0).all())
    if bias is None:
        return
    assert bias.shape == (1, HEADS, TIME, TIME) and bias.abs().min() > 0
    assert torch.equal(position.bias(where, HEADS, 2, TIME), bias[:, :, -2:])
    assert position.bias(where, HEADS, TIME, TIME) is bias
    for offset in range(TIME):  # the same along each diagonal
        assert (bias.diagonal(-offset, 2, 3).std(-1, correction=0) < 1e-12).all()


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


@pytest.mark.parametrize("spec", ROPES)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
@settings(max_examples=20, deadline=None)
def test_only_the_distance_counts(spec, m, n, shift):
    """<R_m q, R_n k> depends on m - n alone, and turning changes all lengths by one gain, or none."""
    rope, q, k = make(spec), numbers(1, 1, 1, DIM, seed=2), numbers(1, 1, 1, DIM, seed=3)
    turn = lambda x, position: rope.rotate(x, at(torch.tensor([position])))  # noqa: E731
    score = (turn(q, m) * turn(k, n)).sum()
    torch.testing.assert_close((turn(q, m + shift) * turn(k, n + shift)).sum(), score, rtol=1e-9, atol=1e-9)
    turned = rope.frequencies(DIM).numel() * 2
    torch.testing.assert_close(turn(q, m)[..., :turned].norm(), q[..., :turned].norm() * rope.gain)


def test_far_positions_in_float32():
    """At position 100,000 the angle itself is rounded: by less than a hundredth of a radian."""
    rope, q = make("rope"), numbers(1, 1, 1, DIM)
    far = at(torch.tensor([100_000]))
    torch.testing.assert_close(
        rope.rotate(q.float(), far).double(), rope.rotate(q, at(torch.tensor([100_000]))), rtol=0, atol=0.01
    )


# What is added to scores


def test_slopes():
    alibi = make("alibi")
    assert alibi.slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi.slopes(1).tolist() == [1 / 256]
    expected = [2 ** (-8 * h / 8) for h in range(1, 9)] + [2 ** (-8 * h / 16) for h in (1, 3, 5, 7)]
    np.testing.assert_allclose(alibi.slopes(12).numpy(), expected, rtol=1e-7)


def bucket(distance, causal, buckets, max_distance):
    """The bucket of key - query, in whole numbers: range k begins at exact (max_distance / exact)^(k / ranges)."""
    count = buckets if causal else buckets // 2
    back, exact, after = max(-distance, 0) if causal else abs(distance), count // 2, count * (distance > 0) * (not causal)
    if back < exact:
        return after + back
    ranges = count - exact
    begun = [back**ranges * exact**k >= exact**ranges * max_distance**k for k in range(1, ranges)]
    return after + exact + sum(begun)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (10, 77), (64, 512)])
def test_buckets(causal, buckets, max_distance):
    distances = range(-600, 600)
    found = make(f"t5:buckets={buckets}:max_distance={max_distance}").bucket(torch.tensor(distances), causal)
    assert found.tolist() == [bucket(d, causal, buckets, max_distance) for d in distances]
    assert {*range(buckets)} - {*found.tolist()} == (set() if causal else {buckets // 2})  # "after, by 0" is never used


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("spec", ["alibi", "t5:buckets=4:max_distance=3"])
def test_attention_with_what_is_added(spec, causal):
    """An attention layer against one softmax in NumPy: penalties the same on both sides, gradients for the table."""
    position = make(spec)
    layer, x = GQA(DIM, position, heads=HEADS).double(), numbers(2, TIME, DIM)
    where = Context(torch.zeros(2, TIME, dtype=torch.int64), torch.arange(TIME), causal=causal)
    y = layer(x, where)
    q, k, v = (part(x).detach().numpy().reshape(2, TIME, HEADS, -1) for part in (layer.query, layer.key, layer.value))
    distance = np.arange(TIME) - np.arange(TIME)[:, None]
    if spec == "alibi":
        added = np.stack([-(2.0 ** (-4 * h)) * abs(distance) for h in (1, 2)])
    else:
        table = position.table.weight.detach().numpy()
        added = np.array([[[table[bucket(d, causal, 4, 3), h] for d in row] for row in distance] for h in range(HEADS)])
    scores = np.einsum("bihd,bjhd->bhij", q, k) / 2 + added
    weights = np.exp(scores) * ((distance <= 0) if causal else 1)
    mixed = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v).reshape(2, TIME, DIM)
    np.testing.assert_allclose(y.detach().numpy(), mixed @ layer.out.weight.detach().numpy().T, rtol=1e-10, atol=1e-12)
    y.square().sum().backward()
    if spec != "alibi":
        used = {bucket(d, causal, 4, 3) for d in range(1 - TIME, 1 if causal else TIME)}
        assert set(position.table.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == used


@pytest.mark.parametrize(
    ("spec", "argument"),
    [
        ("rope:fraction=0", "fraction"), ("rope:fraction=1.5", "fraction"), ("rope:theta=0", "theta"),
        ("rope:factor=0.5", "factor"),
        ("rope:low=4:high=4", "low"), ("rope:original=0", "original"), ("learned:seq_len=0", "seq_len"),
        ("sinusoidal:theta=-1", "theta"), ("rope:low=0", "low"), ("rope:scaling=yarn:low=32", "low"),
        ("rope:scaling=yarn:theta=1", "theta"), ("t5:buckets=3", "buckets"), ("t5:buckets=7", "buckets"),
        ("t5:max_distance=16", "max_distance"), ("t5:heads=0", "heads"),
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
    with pytest.raises(ValueError, match="^heads: .* 2 heads, the mixer has 3$"):
        make("t5").bias(at(torch.arange(1)), 3, 1, 1)
    with pytest.raises(ValueError, match="^heads: "):
        make("alibi").slopes(0)
