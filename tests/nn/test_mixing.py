"""The mixers of nn/mixing: the random matrix, the convolutions, nothing at all."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn.context import Context
from nn.mixing import MIXING, long_convolution
from nn.spec import build
from optim.groups import split_parameters

BATCH, TIME, DIM = 2, 7, 16
CLOSE = dict(rtol=0, atol=1e-10)


def make(spec: str) -> nn.Module:
    torch.manual_seed(0)
    mixer = build(spec, MIXING, "mixer", DIM)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(DIM))
    return mixer.double()


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def context(length: int = TIME, start: int = 0, batch: int = BATCH, **given) -> Context:
    return Context(torch.zeros(batch, length, dtype=torch.int64), torch.arange(start, start + length), **given)


def decoded(mixer: nn.Module, x: Tensor, *lengths: int) -> Tensor:
    state, parts, start = mixer.init_state(len(x), x.shape[1], dtype=x.dtype), [], 0
    for length in lengths:
        parts.append(mixer(x[:, start : start + length], context(length, start, len(x), state=state)))
        start += length
    return torch.cat(parts, 1)


def test_identity():
    mixer, x = make("identity"), numbers(BATCH, TIME, DIM)
    assert mixer(x, context()) is x and mixer.init_state(1, 9, dtype=torch.float32).bytes() == 0


@pytest.mark.parametrize("causal", [True, False])
def test_random_rows_sum_to_one_and_are_frozen(causal):
    mixer, x = make("random:max_len=9"), numbers(BATCH, TIME, DIM).requires_grad_()
    weights = mixer.weights(context(causal=causal), TIME, TIME)[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(TIME).double(), **CLOSE)
    assert not causal or torch.equal(weights.triu(1), torch.zeros_like(weights))
    mixer(x, context(causal=causal)).sum().backward()
    assert not mixer.scores.requires_grad and not [*mixer.parameters()] and x.grad.abs().min() > 0
    by_hand = (mixer.scores[4, : 5 if causal else TIME]).softmax(0)
    torch.testing.assert_close(weights[4, : len(by_hand)], by_hand, **CLOSE)


def test_random_matrix_comes_from_its_seed_and_is_saved():
    one, same, other = (make(f"random:max_len=9:seed={seed}") for seed in (3, 3, 4))
    assert torch.equal(one.scores, same.scores) and not torch.equal(one.scores, other.scores)
    assert 0 <= one.scores.min() < 0.1 and 0.9 < one.scores.max() < 1 and "scores" in one.state_dict()
    with torch.device("meta"):
        assert build("random", MIXING, "mixer", DIM).scores.is_meta


def test_random_rows_count_from_the_start_of_a_document():
    mixer, x = make("random:max_len=7"), numbers(1, TIME, DIM)
    whole = mixer(x, context(batch=1, documents=torch.tensor([[2, 2, 2, 0, 0, 2, 2]])))
    alone = [mixer(part, context(part.shape[1], batch=1)) for part in x.split([3, 2, 2], 1)]
    torch.testing.assert_close(whole, torch.cat(alone, 1), **CLOSE)
    torch.testing.assert_close(decoded(mixer, x, 3, 1, 3), mixer(x, context(batch=1)), **CLOSE)
    with pytest.raises(ValueError, match="^max_len: .* 7 tokens, not for 8$"):
        mixer(numbers(1, 8, DIM), context(8, batch=1))


def test_star_relu_begins_with_mean_0_and_variance_1():
    mixer = build("conv", MIXING, "mixer", DIM)
    assert abs(mixer.star_scale.item() - 0.8944) < 5e-5 and abs(mixer.star_bias.item() + 0.4472) < 5e-5
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    y = mixer.star_scale.double() * x.relu() ** 2 + mixer.star_bias.double()
    mean, square = (torch.trapezoid(value * density, x).item() for value in (y, y**2))
    assert abs(mean) < 1e-6 and abs(square - 1) < 1e-6


def test_conv_against_the_equation():
    mixer, x = make("conv:width=3:expand=1"), numbers(BATCH, TIME, DIM)
    h = mixer.star_scale * mixer.up(x).relu() ** 2 + mixer.star_bias
    y = sum(mixer.taps[:, 2 - lag] * F.pad(h, (0, 0, lag, 0))[:, :TIME] for lag in range(3))
    torch.testing.assert_close(mixer(x, context()), mixer.down(y), **CLOSE)
    torch.testing.assert_close(decoded(mixer, x, 1, 4, 2), mixer(x, context()), **CLOSE)
    documents = torch.tensor([[1, 1, 1, 1, 0, 0, 0]]).expand(BATCH, -1)
    parts = [mixer(part, context(part.shape[1])) for part in x.split([4, 3], 1)]
    torch.testing.assert_close(mixer(x, context(documents=documents)), torch.cat(parts, 1), **CLOSE)
    with pytest.raises(ValueError, match="^causal: "):
        mixer(x, context(causal=False))


LONG = [f"longconv:length={length}:by={by}" for length in (1, 3, 1024) for by in ("fft", "monarch")]


def filters(mixer: nn.Module, lag: int) -> Tensor:
    """K (C,) of one lag, as the equation has it."""
    waves = torch.tensor([2 * mixer.length ** (i / 15) for i in range(16)], dtype=torch.float64)
    angles = 2 * math.pi * lag / waves
    z = torch.cat([angles.cos(), angles.sin()])
    a = mixer.log_decay.exp()
    K = mixer.filters.weight @ (mixer.waves.weight @ z + mixer.waves.bias).sin() + mixer.filters.bias
    return (1 - (-2 * a).exp()).sqrt() * (-a * abs(lag)).exp() * K


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("spec", LONG)
@torch.no_grad()
def test_long_convolution_against_the_equation(spec, causal):
    """Lag by lag: what is nearer than `length` counts, of an encoder on both sides; so does each of two documents alone."""
    mixer, x = make(spec), numbers(BATCH, TIME, DIM)
    p = mixer.up(x)
    x1, x2, v = sum(mixer.taps[:, 2 - lag] * F.pad(p, (0, 0, lag, 0))[:, :TIME] for lag in range(3)).chunk(3, -1)
    u = x1 * v
    y = mixer.D * u
    for t in range(TIME):
        for s in range(t + 1 if causal else TIME):
            if abs(t - s) < mixer.length:
                y[:, t] += filters(mixer, t - s) * u[:, s]
    whole = mixer(x, context(causal=causal))
    torch.testing.assert_close(whole, mixer.out(x2 * y), **CLOSE)
    documents = torch.tensor([[1, 1, 1, 1, 0, 0, 1], [2, 0, 0, 0, 0, 0, 0]])
    packed = mixer(x, context(causal=causal, documents=documents))
    for row, lengths in enumerate([[4, 2, 1], [1, 6]]):
        parts = [mixer(part[None], context(len(part), batch=1, causal=causal))[0] for part in x[row].split(lengths)]
        torch.testing.assert_close(packed[row], torch.cat(parts), **CLOSE)
    if causal:
        torch.testing.assert_close(decoded(mixer, x, 2, 1, 4), whole, **CLOSE)
    else:
        with pytest.raises(ValueError, match="^causal: "):
            mixer(x, context(causal=False, state=mixer.init_state(BATCH, TIME, dtype=x.dtype)))


def test_flops_of_the_long_convolution():
    """Of 8 tokens and 16 channels: 3 taps of 3 projections, and three transforms of 16 points."""
    counts = {"fft": 3 * 16 * (5 * 5 // 2), "monarch": 3 * 16 * 16 * 4}
    for by, transforms in counts.items():
        assert make(f"longconv:by={by}").mixing_flops(8, 8) == 16 * (2 * 3 * 3 * 8 + transforms)


def test_the_long_convolution_is_computed_as_the_option_says(monkeypatch):
    called = []
    monkeypatch.setattr(long_convolution, "circular_convolution", lambda u, k, n: called.append(n) or u)
    for by in ("fft", "monarch"):
        make(f"longconv:by={by}")(numbers(1, TIME, DIM), context(batch=1))
    assert called == [16]  # the square from 2 * 7 - 1 on


def test_filters_begin_with_the_variance_of_what_they_read():
    """Summed over the lags K_l^2 is about 1, at all decays and lengths."""
    for length in (64, 1024):
        torch.manual_seed(0)
        mixer = build(f"longconv:length={length}", MIXING, "mixer", 256)
        assert "taps" in dict(split_parameters(mixer).vector)  # a grid of scalars, no matrix for Muon
        power = mixer.kernel(torch.arange(8 * length)).square().sum(1)  # (C,)
        assert 0.8 < power.mean() < 1.25
        for channels in power.chunk(4):
            assert 0.6 < channels.mean() < 1.5


def test_numbers_remembered():
    """All inputs of the random matrix; the last W - 1 of a convolution, whatever the length."""
    sizes = {"random": lambda n: 16 * n, "conv": lambda n: 6 * 32, "conv:width=4:expand=3": lambda n: 3 * 48}
    for spec, numbers_of in sizes.items():
        mixer = make(spec)
        for length in (1, 50):
            expected = 3 * numbers_of(length) * 2
            assert mixer.state_bytes(3, length, torch.bfloat16) == expected
            assert mixer.init_state(3, length, dtype=torch.bfloat16).bytes() == expected


@pytest.mark.parametrize(
    ("spec", "argument"),
    [
        ("longconv:length=0", "length"), ("longconv:conv=1", "conv"),
        ("conv:width=9", "width"), ("conv:width=1", "width"), ("conv:expand=0", "expand"),
        ("random:max_len=0", "max_len"), ("random:seed=-1", "seed"),
    ],
)  # fmt: skip
def test_impossible_options(spec, argument):
    with pytest.raises(ValueError, match=f"^{argument}: "):
        build(spec, MIXING, "mixer", DIM)
