"""Balanced assignments: against all there are where they can be listed, and by the prices that prove them where they cannot."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.balanced import balanced_assignment, balanced_kmeans, squared_distances


def least_cost(costs: np.ndarray) -> float:
    """Over every assignment whose sizes differ by at most 1."""
    rows, columns = costs.shape
    found = [np.array(labels) for labels in itertools.product(range(columns), repeat=rows)]
    return min(costs[range(rows), a].sum() for a in found if np.ptp(np.bincount(a, minlength=columns)) <= 1)


def check(costs: np.ndarray, labels: np.ndarray, prices: np.ndarray) -> None:
    """Equal sizes, and what proves that nothing is cheaper: linear programming's complementary slackness."""
    rows, columns = costs.shape
    sizes = np.bincount(labels, minlength=columns)
    assert labels.shape == (rows,) and sizes.min() == rows // columns and sizes.max() == -(-rows // columns)
    rounding = 1e-9 * (1 + np.abs(costs).max())
    assert ((costs + prices)[range(rows), labels] <= (costs + prices).min(1) + rounding).all()
    if sizes.min() < sizes.max():
        assert prices[sizes == sizes.max()].min() >= prices[sizes == sizes.min()].max() - rounding


@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 10**6), st.booleans(), st.sampled_from([0, 1, 30]))
@settings(max_examples=200, deadline=None)
def test_the_least_cost_there_is(rows, columns, seed, ties, guess):
    """Also with ties, with fewer rows than columns, and from any prices to begin with."""
    random = np.random.default_rng(seed)
    costs = random.integers(-2, 3, (rows, columns)).astype(float) if ties else random.standard_normal((rows, columns))
    labels, prices = balanced_assignment(costs, guess * random.standard_normal(columns) if guess else None)
    check(costs, labels, prices)
    assert abs(costs[range(rows), labels].sum() - least_cost(costs)) < 1e-9


@pytest.mark.parametrize(("rows", "columns"), [(3000, 4), (3001, 7), (2000, 64), (50, 60)])
def test_proved_by_prices(rows, columns):
    """Sizes at which nobody lists them all, where most rows want the same column."""
    random = np.random.default_rng(0)
    costs = squared_distances(random.standard_normal((rows, 6)) + 1, random.standard_normal((columns, 6)))
    assert np.bincount(costs.argmin(1), minlength=columns).max() > -(-rows // columns)
    labels, prices = balanced_assignment(costs)
    check(costs, labels, prices)
    again, _ = balanced_assignment(costs, prices)
    assert abs(costs[range(rows), again].sum() - costs[range(rows), labels].sum()) < 1e-8


def test_all_rows_want_one_column():
    costs = np.tile(np.arange(5.0), (20, 1))
    labels, prices = balanced_assignment(costs)
    check(costs, labels, prices)


def test_kmeans_finds_blobs_and_cuts_them_equally():
    """Blobs of 60, 60 and 63 points of which each cluster is to hold 61: two points change sides, and no more."""
    random = np.random.default_rng(0)
    kinds = np.repeat([0, 1, 2], [60, 60, 63])
    points = np.array([[0, 0], [20, 0], [10, 17]])[kinds] + random.standard_normal((183, 2))
    labels, centres = balanced_kmeans(points, 3, seed=1)
    assert (np.bincount(labels) == 61).all()
    table = np.array([[((labels == j) & (kinds == kind)).sum() for kind in range(3)] for j in range(3)])
    assert np.sort(table.max(1)).tolist() == [60, 60, 61] and np.sort(table.ravel())[-5:].tolist() == [1, 1, 60, 60, 61]
    for j in range(3):
        np.testing.assert_allclose(centres[j], points[labels == j].mean(0), atol=1e-12)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_kmeans_ends_where_neither_step_helps(count, k, seed):
    k, random = min(k, count), np.random.default_rng(seed)
    points = random.integers(0, 4, (count, 2)).astype(float)  # some of them the same
    labels, centres = balanced_kmeans(points, k, seed=seed)
    assert np.ptp(np.bincount(labels, minlength=k)) <= 1 and np.bincount(labels, minlength=k).min() >= 1
    np.testing.assert_allclose(centres, [points[labels == j].mean(0) for j in range(k)], atol=1e-12)
    costs = squared_distances(points, centres)
    best, _ = balanced_assignment(costs)
    assert costs[range(count), labels].sum() <= costs[range(count), best].sum() + 1e-9


def test_kmeans_never_gets_dearer_and_restarts_pay():
    points = np.random.default_rng(0).standard_normal((120, 3))

    def cost(**options) -> float:
        labels, centres = balanced_kmeans(points, 5, **options)
        return squared_distances(points, centres)[range(120), labels].sum()

    by_rounds = [cost(restarts=1, rounds=n) for n in range(1, 12)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(by_rounds)) and by_rounds[-1] < by_rounds[0]
    by_restarts = [cost(restarts=n) for n in (1, 2, 4, 8)]
    assert all(more <= fewer for fewer, more in itertools.pairwise(by_restarts)) and by_restarts[-1] < by_restarts[0]
    assert cost(seed=3) == cost(seed=3)


def test_squared_distances():
    points, centres = np.random.default_rng(0).standard_normal((2, 5, 3))
    expected = [[np.linalg.norm(p - c) ** 2 for c in centres] for p in points]
    np.testing.assert_allclose(squared_distances(points, centres), expected)


def test_bad_input():
    for costs in (np.zeros(3), np.zeros((0, 2)), np.zeros((2, 0)), np.array([[0.0, np.nan]])):
        with pytest.raises(ValueError, match="^costs: "):
            balanced_assignment(costs)
    points = np.zeros((3, 2))
    for name, value in dict(k=0, restarts=0, rounds=0).items():
        with pytest.raises(ValueError, match=f"^{name}: 0"):
            balanced_kmeans(points, **dict(k=2) | {name: value})
    with pytest.raises(ValueError, match="^k: 4 clusters of 3 points"):
        balanced_kmeans(points, 4)
