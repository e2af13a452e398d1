"""Clusters against scikit-learn and SciPy: tf-idf, truncated SVD, k-means and the assignment of least cost."""

import numpy as np
import pytest

from data import training_documents
from data.balanced import balanced_assignment, balanced_kmeans, squared_distances
from data.tfidf import WORD, count, fit_embedding, truncated_svd

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from scipy.optimize import linear_sum_assignment  # noqa: E402
from scipy.sparse import csr_matrix  # noqa: E402
from sklearn.cluster import KMeans  # noqa: E402
from sklearn.decomposition import TruncatedSVD  # noqa: E402
from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: E402
from sklearn.preprocessing import Normalizer, StandardScaler  # noqa: E402


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The first 3,000 characters of every sixth file of Python's library that has as many."""
    return [document.text[:3000] for document in training_documents("python") if len(document.text) > 3000][::6]


@pytest.fixture(scope="module")
def weights(texts) -> tuple[csr_matrix, list[str]]:
    peer = TfidfVectorizer(token_pattern=WORD.pattern, max_df=0.5)
    return peer.fit_transform(texts), peer.get_feature_names_out().tolist()


def test_tfidf(texts, weights):
    embedding, _ = fit_embedding(texts, dims=2)
    matrix, words = weights
    assert embedding.words == words and len(words) > 2000
    number = {word: i for i, word in enumerate(words)}
    for row, text in zip(matrix, texts, strict=True):
        found = np.zeros(len(words))
        for word in count(text).keys() & number.keys():
            found[number[word]] = count(text)[word] * embedding.idf[number[word]]
        np.testing.assert_allclose(row.toarray()[0], found / np.linalg.norm(found), atol=1e-12)


def test_truncated_svd(weights):
    """Near the exact solver, and as near as the peer's own randomised one: of values that are close to each other either
    finds a little less than there is."""
    matrix, words = weights
    ours = truncated_svd([(row.indices.astype(np.int64), row.data) for row in matrix], len(words), 20, seed=0)
    found = np.linalg.norm(matrix @ ours, axis=0)
    exact = TruncatedSVD(20, algorithm="arpack", random_state=0).fit(matrix)
    peer = TruncatedSVD(20, random_state=0).fit(matrix).singular_values_
    np.testing.assert_allclose(found[:3], exact.singular_values_[:3], rtol=1e-3)
    np.testing.assert_allclose(np.abs((ours.T * exact.components_).sum(1))[:3], 1, rtol=1e-2)
    assert (found <= exact.singular_values_ * (1 + 1e-9)).all() and (found**2).sum() > 0.999 * (peer**2).sum()


@pytest.mark.parametrize("scaling", ["unit", "standard"])
def test_points(texts, weights, scaling):
    """All directions kept, as both then span the same: inner products are independent of signs."""
    matrix, _ = weights
    _, ours = fit_embedding(texts, dims=200, scaling=scaling)
    left, singular, _ = np.linalg.svd(matrix.toarray(), full_matrices=False)
    assert ours.shape == left.shape
    theirs = (Normalizer() if scaling == "unit" else StandardScaler()).fit_transform(left * singular)
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-6)


def test_kmeans():
    """Of blobs that are equally large, balanced or not is the same: centres and cost agree."""
    random = np.random.default_rng(0)
    points = np.concatenate([random.standard_normal((50, 5)) + 8 * random.standard_normal(5) for _ in range(6)])
    labels, centres = balanced_kmeans(points, 6)
    peer = KMeans(6, n_init=10, random_state=0).fit(points)
    np.testing.assert_allclose(centres[np.lexsort(centres.T)], peer.cluster_centers_[np.lexsort(peer.cluster_centers_.T)])
    cost = squared_distances(points, centres)[range(300), labels].sum()
    np.testing.assert_allclose(cost, peer.inertia_)


@pytest.mark.parametrize(("rows", "columns"), [(300, 3), (400, 8), (210, 210)])
def test_assignment(rows, columns):
    """Each column written down as often as it has room, `linear_sum_assignment` finds the same least cost."""
    random = np.random.default_rng(rows)
    costs = squared_distances(random.standard_normal((rows, 4)) + 1, random.standard_normal((columns, 4)))
    labels, _ = balanced_assignment(costs)
    repeated = np.repeat(costs, rows // columns, axis=1)
    chosen, places = linear_sum_assignment(repeated)
    np.testing.assert_allclose(costs[range(rows), labels].sum(), repeated[chosen, places].sum(), rtol=1e-9)
