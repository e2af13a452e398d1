"""PowerNorm and UnifiedNorm step by step against NumPy, and what the papers say of them; FakeNorm before and after removal."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nn.norm import FakeNorm, LayerNorm, PowerNorm, UnifiedNorm
from nn.norm.affine import affine, exactly
from nn.norm.unified_norm import geometric_mean, mean_gap

DIM, STEPS = 5, 12


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.3


def draws(count: int = STEPS, outlier: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x, dy) of each step; at `outlier` one feature is 50 times as large."""
    pairs = [(numbers(2, 3, DIM, seed=i), numbers(2, 3, DIM, seed=1000 + i)) for i in range(count)]
    if outlier is not None:
        pairs[outlier][0][..., 1] *= 50
    return pairs


def run(norm, pairs) -> list[tuple[np.ndarray, np.ndarray]]:
    """(y, dx) of each step of training."""
    found = []
    for x, dy in pairs:
        x = x.clone().requires_grad_()
        y = norm.train()(x)
        y.backward(dy)
        found.append((y.detach().numpy(), x.grad.numpy()))
    return found


def power_steps(pairs, decay, eps, warmup):
    psi2, nu, found = np.ones(DIM), np.zeros(DIM), []
    for t, (x, dy) in enumerate((x.numpy().reshape(-1, DIM), dy.numpy().reshape(-1, DIM)) for x, dy in pairs):
        batch = (x**2).mean(0)
        psi = np.sqrt((batch if t < warmup else psi2) + eps)
        h = x / psi
        lam, gamma = (dy * h).mean(0), (h**2).mean(0)
        found.append((h, (dy - (lam if t < warmup else nu) * h) / psi))
        psi2 = decay * psi2 + (1 - decay) * batch
        nu = nu * (1 - (1 - decay) * gamma) + (1 - decay) * lam
    return found


def unified_steps(pairs, decay, eps, warmup, M, filter):
    """With lists instead of a ring: what the last M steps left behind, oldest first."""
    squares, products, psi2, nu, found, skipped = [], [], np.ones(DIM), np.zeros(DIM), [], 0
    for t, (x, dy) in enumerate((x.numpy().reshape(-1, DIM), dy.numpy().reshape(-1, DIM)) for x, dy in pairs):
        batch = (x**2).mean(0)
        window, outlier = np.array([*squares, batch][-M:]), False
        if filter and t >= max(M, warmup) and M > 1:
            gap = window.mean(0) - window.prod(0) ** (1 / M)
            outlier = bool((gap > M * np.sqrt(np.array(squares[-M:])).var(ddof=1)).any())
        alone = t < max(M, warmup) or outlier or M == 1
        used = batch if alone else window.prod(0) ** (1 / M)
        squares.append(psi2 if outlier else batch)
        psi2 = decay * psi2 + (1 - decay) * used
        psi = np.sqrt(used + eps)
        h = x / psi
        gh = (dy * h).mean(0)
        products.append(nu if outlier else gh)
        nu = decay * nu + (1 - decay) * (gh if alone else np.array(products[-M:]).mean(0))
        found.append((h, (dy - (gh if alone else nu) * h) / psi))
        skipped += outlier
    return found, skipped


def same(found, expected) -> None:
    for pair, other in zip(found, expected, strict=True):
        for a, b in zip(pair, other, strict=True):
            np.testing.assert_allclose(a.reshape(-1, DIM), b.reshape(-1, DIM), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_powernorm_step_by_step(warmup, decay):
    norm = PowerNorm(DIM, decay=decay, eps=1e-3, warmup=warmup, gain=False, bias=False).double()
    same(run(norm, draws()), power_steps(draws(), decay, 1e-3, warmup))


@pytest.mark.parametrize("filter", [False, True])
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("warmup", [0, 6])
def test_unifiednorm_step_by_step(window, warmup, filter):
    options = dict(decay=0.8, eps=1e-3, warmup=warmup)
    norm = UnifiedNorm(DIM, window=window, filter=filter, gain=False, bias=False, **options).double()
    expected, skipped = unified_steps(draws(outlier=9), 0.8, 1e-3, warmup, window, filter)
    same(run(norm, draws(outlier=9)), expected)
    assert norm.skipped == skipped and (skipped > 0) == (filter and window > 1)


def test_powernorm_of_one_batch_has_the_exact_gradient():
    """The same batch and upstream gradient again and again: the running statistics become those of the batch."""
    norm = PowerNorm(DIM, warmup=0, eps=0, gain=False, bias=False).double()
    x, dy = numbers(4, 6, DIM, seed=1), numbers(4, 6, DIM, seed=2)
    y, dx = run(norm, [(x, dy)] * 2000)[-1]
    leaf = x.clone().requires_grad_()
    exact = leaf / leaf.square().mean((0, 1)).sqrt()
    exact.backward(dy)
    np.testing.assert_allclose(y, exact.detach().numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(dx, leaf.grad.numpy(), rtol=0, atol=1e-12)


def test_powernorm_begins_without_the_correction():
    norm = PowerNorm(DIM, warmup=0, gain=False, bias=False).double()
    (_, dx), (_, dy) = run(norm, draws(1))[0], draws(1)[0]
    np.testing.assert_allclose(dx, dy.numpy() / np.sqrt(1 + 1e-5), rtol=1e-12)


def test_gain_and_bias_learn_exactly():
    norm = PowerNorm(DIM, warmup=0).double()
    x, dy = draws(1)[0]
    norm(x.requires_grad_()).backward(dy)
    h = x.detach() / np.sqrt(1 + 1e-5)
    torch.testing.assert_close(norm.weight.grad, (dy * h).sum((0, 1)))
    torch.testing.assert_close(norm.bias.grad, dy.sum((0, 1)))


def test_a_window_of_one_is_powernorm_with_batch_statistics():
    one = UnifiedNorm(DIM, window=1, warmup=0).double()
    same(run(one, draws()), run(PowerNorm(DIM, warmup=10**6).double(), draws()))
    x = numbers(2, 3, DIM, seed=5)
    other = PowerNorm(DIM, warmup=10**6).double()
    run(other, draws())
    torch.testing.assert_close(one.eval()(x), other.eval()(x), rtol=0, atol=1e-14)


@given(st.lists(st.lists(st.floats(0, 1e6), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_arithmetic_mean_is_never_below_the_geometric(rows):
    window = torch.tensor(rows, dtype=torch.float64)
    assert (mean_gap(window) >= -1e-9 * window.mean(0)).all()
    expected = np.prod(window.numpy() ** (1 / len(rows)), axis=0)
    np.testing.assert_allclose(geometric_mean(window).numpy(), expected, rtol=1e-9)
    assert (mean_gap(window[:1].expand(4, 3)).abs() <= 1e-9 * window[0]).all()


def test_constant_statistics_are_plain_division():
    norm, (x, _) = UnifiedNorm(DIM, eps=0, warmup=0, gain=False, bias=False).double(), draws(1)[0]
    ys = [y for y, _ in run(norm, [(x, x)] * 10)]
    expected = x / x.square().mean((0, 1)).sqrt()
    np.testing.assert_allclose(ys, np.broadcast_to(expected, (10, *expected.shape)), rtol=1e-12)


def test_the_filter_keeps_an_outlier_from_the_next_steps():
    def after(filter: bool) -> float:
        """How much too small the outputs of the outlier's feature are one step later."""
        norm = UnifiedNorm(DIM, filter=filter, warmup=0, gain=False, bias=False).double()
        y = run(norm, draws(11, outlier=9))[10][0][..., 1]
        return float(np.sqrt((y**2).mean()))

    assert 0.7 < after(True) < 1.4 and after(False) < 0.5


def test_compiled():
    """torch.compile breaks its graph where it must and computes the same."""
    same(run(torch.compile(PowerNorm(DIM).double(), backend="eager"), draws(3)), run(PowerNorm(DIM).double(), draws(3)))


def test_fakenorm_with_a_tokens_own_spread_is_layernorm():
    fake, real, x = FakeNorm(DIM).double(), LayerNorm(DIM).double(), numbers(7, DIM, seed=3)
    for token in x:
        fake.remove(sigma=(token.var(correction=0) + 1e-5).sqrt().item())
        torch.testing.assert_close(fake(token), real(token), rtol=1e-12, atol=1e-12)


def test_fakenorm_follows_the_mean_spread():
    norm, pairs = FakeNorm(DIM, decay=0.75).double(), draws(6)
    run(norm, pairs)
    spreads = [np.sqrt(x.numpy().var(-1) + 1e-5).mean() for x, _ in pairs]
    sigma = np.mean(spreads[:4])
    for spread in spreads[4:]:
        sigma = 0.75 * sigma + 0.25 * spread
    np.testing.assert_allclose(norm.sigma.item(), sigma, rtol=1e-12)


def test_a_removed_fakenorm_is_linear_and_stays_so():
    norm = FakeNorm(DIM).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    with pytest.raises(ValueError, match="^sigma: the norm has seen no training batch"):
        norm.remove()
    with pytest.raises(ValueError, match="^sigma: -1.0 is not above 0"):
        norm.remove(sigma=-1.0)
    with pytest.raises(ValueError, match="^norm: a fakenorm that was not removed"):
        norm.linear_form()
    run(norm, draws(3))
    norm.remove()
    sigma, x = norm.sigma.item(), numbers(4, DIM, seed=9)
    run(norm, draws(3))
    assert norm.sigma.item() == sigma and norm.steps == 3
    expected = (x - x.mean(-1, keepdim=True)) / sigma * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [PowerNorm, UnifiedNorm, FakeNorm])
def test_linear_form(make):
    norm, x = make(DIM).double(), numbers(4, DIM, seed=9)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    run(norm, draws(3))
    if make is FakeNorm:
        norm.remove()
    matrix, bias = norm.eval().linear_form()
    torch.testing.assert_close(norm(x), x @ matrix.T + bias, rtol=1e-12, atol=1e-12)


def test_gain_and_bias_are_applied_before_the_one_rounding():
    """In bfloat16, 1 + 1/256 is halfway between two numbers: rounded after the gain it would be 1, and the bias lost."""
    x, gain, bias = (torch.tensor([value], dtype=torch.bfloat16) for value in (1.0, 1.0, 2.0**-8))
    assert exactly(x).dtype == torch.float32 and exactly(x.double()).dtype == torch.float64
    y = affine(exactly(x) + 2.0**-9, gain, bias, torch.bfloat16)
    assert y.dtype == torch.bfloat16 and y.item() == 1 + 2.0**-7
    assert affine(exactly(x), None, bias.double(), torch.float64).item() == 1 + 2.0**-8
    assert affine(exactly(x), 3 * gain, None, torch.float32).item() == 3
