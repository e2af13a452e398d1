"""Texts as points: against the formula written out on dense matrices, and against the full decomposition of them."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tfidf import count, fit_embedding, truncated_svd

TEXTS = [
    "red red green 12 7up a",
    "green blue, blue! Blue",
    "yellow_1 red blue",
    "the Üb üb green",
    "1 2 3 ?",
    "red yellow_1 yellow_1",
    "violet",
]


def dense_tfidf(texts: list[str], common: float = 1.0) -> tuple[list[str], np.ndarray]:
    """Words and rows (N, V), one entry at a time."""
    found = [[w for w in re.split(r"\W+", text.lower()) if len(w) > 1 and not w[0].isdigit()] for text in texts]
    words = sorted({w for said in found for w in said if sum(w in other for other in found) <= common * len(texts)})
    rows = np.zeros((len(texts), len(words)))
    for i, said in enumerate(found):
        for j, word in enumerate(words):
            texts_with = sum(word in other for other in found)
            rows[i, j] = said.count(word) * (math.log((1 + len(texts)) / (1 + texts_with)) + 1)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return words, rows / np.where(lengths > 0, lengths, 1)


def test_words():
    text = "Ab ab_1 1ab a a1 Ünï don't x2y 3.14 _x"
    assert count(text) == dict.fromkeys(["ab", "ab_1", "a1", "ünï", "don", "x2y", "_x"], 1)


@pytest.mark.parametrize("common", [1.0, 0.3])
def test_weights_against_the_formula_on_a_dense_matrix(common):
    """The SVD keeps all there is of so few texts, so that inner products of points are those of the weights."""
    words, rows = dense_tfidf(TEXTS, common)
    embedding, points = fit_embedding(TEXTS, common=common)
    assert embedding.words == words and ("red" in words) == (common == 1)
    raw = rows @ embedding.components
    np.testing.assert_allclose(raw @ raw.T, rows @ rows.T, atol=1e-12)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(points, raw / np.where(lengths > 0, lengths, 1), atol=1e-12)
    np.testing.assert_allclose(embedding(TEXTS), points, atol=1e-12)
    assert not points[4].any()  # no words: nowhere


def test_standard_scaling():
    embedding, points = fit_embedding(TEXTS, common=1.0, dims=3, scaling="standard")
    raw = dense_tfidf(TEXTS)[1] @ embedding.components
    np.testing.assert_allclose(points, (raw - raw.mean(0)) / raw.std(0), atol=1e-10)
    np.testing.assert_allclose(embedding(TEXTS), points, atol=1e-12)
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(points.std(0), 1, atol=1e-12)


def test_texts_of_another_day_are_weighed_by_the_fit():
    """Words that the fit did not see do not count, not even in the length."""
    embedding, points = fit_embedding(TEXTS, common=1.0, dims=4)
    np.testing.assert_allclose(embedding(["violet unheard-of things"]), points[6:], atol=1e-12)
    np.testing.assert_allclose(embedding([TEXTS[1]] * 2), points[[1, 1]], atol=1e-12)
    assert embedding([]).shape == (0, 4) and embedding(iter(TEXTS)).shape == (7, 4)


def sparse(matrix: np.ndarray) -> list:
    return [(np.flatnonzero(row), row[row != 0]) for row in matrix]


@given(st.integers(1, 30), st.integers(1, 25), st.integers(1, 12), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_svd_against_numpys(rows, width, dims, seed, low_rank):
    """What is kept holds as much of the matrix as the best there is, in orthonormal columns, the largest first."""
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((rows, width)) * (random.random((rows, width)) < 0.5)
    if low_rank:
        matrix = np.outer(random.standard_normal(rows), random.standard_normal(width))
    singular = np.linalg.svd(matrix, compute_uv=False)
    if singular[0] < 1e-6:
        return
    components = truncated_svd(sparse(matrix), width, dims, seed)
    rank = int((singular > 1e-9 * singular[0]).sum())
    assert components.shape == (width, min(dims, rank))
    np.testing.assert_allclose(components.T @ components, np.eye(components.shape[1]), atol=1e-9)
    kept = np.linalg.norm(matrix @ components, axis=0)
    np.testing.assert_allclose(kept, singular[: len(kept)], rtol=1e-3, atol=1e-9)
    assert (components[np.abs(components).argmax(0), range(len(kept))] > 0).all()


def test_svd_of_a_matrix_larger_than_the_subspace():
    """150 x 250 of which 5 + 10 directions are followed: exact where the values fall, and near the best where they do not."""
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.standard_normal((n, 40)))[0] for n in (150, 250))
    singular = 0.8 ** np.arange(40)
    matrix = left * singular @ right.T
    components = truncated_svd(sparse(matrix), 250, 5, seed=1)
    np.testing.assert_allclose(np.abs(components.T @ right[:, :5]), np.eye(5), atol=1e-9)
    noise = random.standard_normal((150, 250))
    best = (np.linalg.svd(noise, compute_uv=False)[:5] ** 2).sum()
    found = (np.linalg.norm(noise @ truncated_svd(sparse(noise), 250, 5, seed=1), axis=0) ** 2).sum()
    assert 0.9 * best < found <= best * (1 + 1e-12)


def test_the_largest_vocabulary():
    """The words of most texts, and of those in equally many the first ones."""
    assert fit_embedding(TEXTS, common=1.0, max_words=3)[0].words == ["blue", "green", "red"]
    assert fit_embedding(TEXTS, common=1.0, max_words=5)[0].words == ["blue", "green", "red", "the", "yellow_1"]
    assert fit_embedding(TEXTS, common=0.3, max_words=1)[0].words == ["blue"]


def test_the_same_seed_gives_the_same_numbers():
    one, two = (fit_embedding(TEXTS, dims=3, seed=3)[1] for _ in range(2))
    assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (TEXTS, dict(dims=0), "dims: 0"),
        (TEXTS, dict(max_words=0), "max_words: 0"),
        (TEXTS, dict(common=0.0), "common: 0.0"),
        (TEXTS, dict(common=1.5), "common: 1.5"),
        (TEXTS, dict(scaling="none"), "scaling: 'none' is not one of unit, standard"),
        ([], {}, "texts: 0 of them"),
        (["1 2", "a"], {}, "texts: 2 of them"),
        (["same", "same"], {}, "texts: 2 of them, and no word of two letters that at most 50% of them have"),
    ],
)
def test_bad_input(texts, options, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        fit_embedding(texts, **options)
    assert "\n" not in str(caught.value)
