"""Laws of measured losses: what is planted is found again, the published constants say what the papers say of them."""

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.laws.routed import PUBLISHED, RoutedLaw, fit
from models.laws.speedup import dense_compute, speedup

LADDER = 1e12 * 2.0 ** np.arange(8)


def power_law(compute, factor: float = 1.0):
    """Losses of dense models, or of those that do with `factor` times less."""
    return 30 * (factor * np.asarray(compute)) ** -0.08


@pytest.mark.parametrize("compute", LADDER[:5])
def test_four_times_less_compute_is_a_speedup_of_four(compute):
    assert speedup(power_law(compute, 4.0), compute, LADDER, power_law(LADDER)) == pytest.approx(4.0, rel=1e-12)


@given(st.floats(1e12, 1.28e14 / 4), st.floats(0.5, 4.0), st.permutations(range(8)))
def test_the_speedup_between_the_rungs_is_that_of_the_law(compute, factor, order):
    if not 1e12 <= factor * compute <= 1.28e14:
        return
    order = list(order)
    found = speedup(power_law(compute, factor), compute, LADDER[order], power_law(LADDER)[order])
    assert found == pytest.approx(factor, rel=1e-2)  # the curve is nearly straight between two rungs


def test_the_curve_is_straight_in_the_logarithm_of_compute():
    assert dense_compute(3.0, [100.0, 1.0], [2.0, 4.0]) == pytest.approx(10.0)
    assert dense_compute(2.0, [100.0, 1.0], [2.0, 4.0]) == pytest.approx(100.0)
    assert dense_compute(3.5, [1.0, 100.0, 1e6], [4.0, 3.0, 0.0]) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1.9, 1, [1, 10], [4, 2]), "^loss: 1.9 lies outside of the dense curve, 2 to 4"),
        ((4.1, 1, [1, 10], [4, 2]), "^loss: 4.1 lies outside"),
        ((float("nan"), 1, [1, 10], [4, 2]), "^loss: nan lies outside"),
        ((3, 0, [1, 10], [4, 2]), "^spent: 0 is no compute"),
        ((3, 1, [1, 10], [2, 4]), "^losses: those of dense models must fall"),
        ((3, 1, [1, 1], [4, 2]), "^losses: those of dense models must fall"),
        ((3, 1, [1, 10], [4, float("nan")]), "^losses: those of dense models must fall"),
        ((3, 1, [0, 10], [4, 2]), "^compute: it must be finite and positive"),
        ((3, 1, [1], [4]), "^compute: .* at least two numbers"),
        ((3, 1, [1, 10], [4]), "^compute: .* as many of both"),
    ],
)
def test_bad_curves_are_one_line(given, message):
    with pytest.raises(ValueError, match=message):
        speedup(*given)


laws = st.builds(
    RoutedLaw, st.floats(-0.2, -0.03), st.floats(-0.3, -0.01), st.floats(0.001, 0.02), st.floats(0.5, 2), st.floats(1, 5),
    st.floats(50, 1e4),
)  # fmt: skip


@given(laws)
def test_saturation_begins_at_start_and_ends_at_most(law):
    assert law.saturated(1) == pytest.approx(law.start, rel=1e-12)
    assert law.saturated(np.inf) == pytest.approx(law.most, rel=1e-12)
    many = law.saturated(2.0 ** np.arange(40))
    assert (np.diff(many) >= 0).all() and (np.diff(many)[:5] > 0).all()


def test_without_saturation_experts_count_as_they_are():
    np.testing.assert_allclose(RoutedLaw(-0.1, -0.1, 0.01, 1.0).saturated([1, 2, 16, 512]), [1, 2, 16, 512], rtol=1e-12)


@given(laws, st.floats(1e4, 1e9), st.floats(1, 512))
def test_the_effective_size_is_the_dense_size_of_the_same_loss(law, size, experts):
    if law.a + law.c * np.log10(law.start) > -0.01:
        return  # a dense model that hardly gains from its size
    assert law.effective(size, 1) == pytest.approx(size, rel=1e-9)
    assert law.loss(law.effective(size, experts), 1) == pytest.approx(law.loss(size, experts), rel=1e-9)


@given(laws, st.floats(1e4, 1e9))
def test_what_experts_bring_shrinks_with_the_size_and_is_nothing_at_the_cutoff(law, size):
    z = np.log10(law.saturated([1.0, 64.0]))
    gained = lambda n: -np.diff(np.log10(law.loss(n, [1.0, 64.0])))[0] / np.diff(z)[0]  # noqa: E731
    assert gained(size) == pytest.approx(law.gain(size), rel=1e-6, abs=1e-9)
    assert gained(size) > gained(10 * size)
    assert law.gain(law.cutoff) == pytest.approx(0, abs=1e-9)
    assert RoutedLaw(law.a, law.b, 0.0, law.d, law.start, law.most).cutoff == np.inf


def test_the_published_constants_say_what_the_paper_says():
    """Cut-offs of 937, 85 and 83 billion, within what rounding c leaves open; 5M with 128 experts: about 55M."""
    assert PUBLISHED["sinkhorn"].cutoff == pytest.approx(1e12)
    for router, theirs in (("sinkhorn", 937e9), ("rl", 85e9), ("hash", 83e9)):
        law = PUBLISHED[router]
        least, most = (10 ** (-law.b / (law.c + half)) for half in (0.0005, -0.0005))
        assert least < theirs < most
    assert 0.9 * 55e6 < PUBLISHED["sinkhorn"].effective(5e6, 128) < 1.1 * 55e6
    worth = {router: law.effective(1e8, 64) for router, law in PUBLISHED.items()}
    assert max(worth, key=worth.get) == "sinkhorn"


GRID = np.array([(n, e) for n in (15e6, 55e6, 130e6, 370e6, 1.3e9) for e in 2.0 ** np.arange(10)]).T
FEW = np.array([(n, e) for n in (1e4, 3e4, 1e5) for e in (1, 2, 4, 8, 16)]).T


@pytest.mark.parametrize("planted", PUBLISHED.values(), ids=PUBLISHED)
def test_planted_constants_are_found(planted):
    found = fit(*GRID, planted.loss(*GRID))
    np.testing.assert_allclose(astuple(found), astuple(planted), rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_planted_constants_are_found_in_noise(seed):
    planted = PUBLISHED["sinkhorn"]
    noise = np.exp(0.001 * np.random.default_rng(seed).normal(size=GRID.shape[1]))
    found = fit(*GRID, planted.loss(*GRID) * noise)
    np.testing.assert_allclose(astuple(found)[:4], astuple(planted)[:4], rtol=0.15)
    assert np.abs(np.log(found.loss(*GRID) / planted.loss(*GRID))).max() < 0.003


def test_known_saturation_is_kept_and_leaves_a_linear_fit():
    planted = RoutedLaw(-0.1, -0.05, 0.004, 0.9)
    np.testing.assert_allclose(astuple(fit(*FEW, planted.loss(*FEW), start=1, most=np.inf)), astuple(planted), rtol=1e-9)
    half = RoutedLaw(-0.1, -0.05, 0.004, 0.9, 1.7, 200.0)
    found = fit(*FEW, half.loss(*FEW), most=200.0)
    assert found.most == 200.0
    np.testing.assert_allclose(astuple(found), astuple(half), rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([1e4, 1e5], [1, 2], [3, 2]), "^sizes: 2 runs cannot tell 6 constants"),
        (([1e4] * 8, [1, 2] * 4, [3, 2] * 4), "^sizes: 8 runs .* at least two sizes"),
        (([1e4, 1e5] * 4, [2] * 8, [3, 2] * 4), "^sizes: 8 runs .* two numbers of experts"),
        (([1e4, -1] * 4, [1, 2] * 4, [3, 2] * 4), "^sizes: must be positive"),
        (([1e4, 1e5] * 4, [0, 2] * 4, [3, 2] * 4), "^experts: must be positive"),
        (([1e4, 1e5] * 4, [1, 2] * 4, [3, float("nan")] * 4), "^losses: must be positive"),
        (([1e4, 1e5] * 4, [1, float("inf")] * 4, [3, 2] * 4), "^sizes: .* must be finite"),
        (([1e4, 1e5], [1, 2], [3, 2, 1]), "^sizes: shapes"),
    ],
)
def test_bad_runs_are_one_line(given, message):
    with pytest.raises(ValueError, match=message):
        fit(*given)


def test_bad_constants_are_one_line():
    with pytest.raises(ValueError, match="^start: 5 must be positive and less than most, 4"):
        RoutedLaw(-0.1, -0.1, 0.01, 1.0, 5, 4)
    with pytest.raises(ValueError, match="^start: 30 must be"):
        fit(*FEW, PUBLISHED["rl"].loss(*FEW), start=30, most=20)
    with pytest.raises(ValueError, match="^experts: must be positive"):
        PUBLISHED["rl"].loss(1e6, 0)
