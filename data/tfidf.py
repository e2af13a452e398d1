"""Texts as points: tf-idf, a truncated SVD of it, and one scale for all (latent semantic analysis), in NumPy.

    weight of word w in a text   n_w (ln((1 + N) / (1 + N_w)) + 1), then each text's weights divided by their length
    point of a text              its weights (V,) times the first right singular vectors (V, d) of all texts' weights (N, V)

n_w: how often w stands in the text; N_w: in how many of the N texts it stands; the ones smooth the logarithm as if one more
text held every word. Words are runs of two or more letters, digits and underscores, in lower case, that do not begin with a
digit. Words in more than half of the texts tell none apart and are left out, in place of a list of stop words of one language.

Cost: nothing of size N x V is made. A pass over the texts takes 4 d FLOPs for each different word of each text. 10,000 texts of
200 words, 20,000 words in all, take less than a minute on a core and half a gigabyte.

Deerwester et al. 1990, "Indexing by latent semantic analysis"; the singular vectors by subspace iteration: Halko, Martinsson
and Tropp 2011, "Finding structure with randomness" (arXiv:0909.4061), algorithm 4.4.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

WORD = re.compile(r"\b[^\W\d]\w+")
SCALINGS = ("unit", "standard")
PASSES = 8  # over the texts, of the subspace iteration
SPARE = 10  # directions carried along beside those that are kept

Row = tuple[np.ndarray, np.ndarray]  # of one text: numbers of its words, ascending, and something for each


@dataclass(frozen=True)
class Embedding:
    """What turns texts into points: V words, d dimensions.

    scaling: `unit` divides each point by its length, as the authors of c-BTM do in their code; `standard` takes the mean of
    each coordinate away and divides by its standard deviation over the texts of the fit, as they say in their paper.
    """

    words: list[str]  # V, sorted
    idf: np.ndarray  # (V,) float64
    components: np.ndarray  # (V, d) float64, orthonormal columns, singular values descending
    mean: np.ndarray  # (d,) float64
    deviation: np.ndarray  # (d,) float64
    scaling: str

    def __call__(self, texts: Iterable[str]) -> np.ndarray:
        """(n, d) float64. A text with none of the words has the weights 0, and with `unit` the point 0."""
        number = {word: i for i, word in enumerate(self.words)}
        return self.scaled(_project((_weighted(_known(count(text), number), self.idf) for text in texts), self.components))

    def scaled(self, points: np.ndarray) -> np.ndarray:
        """(n, d) of what the SVD gives, (n, d)."""
        if self.scaling == "standard":
            return (points - self.mean) / self.deviation
        length = np.linalg.norm(points, axis=1, keepdims=True)
        return points / np.where(length > 0, length, 1)


def fit_embedding(
    texts: Iterable[str],
    *,
    dims: int = 100,
    max_words: int = 20_000,
    common: float = 0.5,
    scaling: str = "unit",
    seed: int = 0,
) -> tuple[Embedding, np.ndarray]:
    """The embedding learned from the texts, read once, and their points (N, d).

    dims: d at most; fewer where the texts span fewer. common: the largest share of the texts that a word may stand in.
    max_words: of these words the V that stand in most texts. The seed draws the directions from which the subspace iteration
    begins; texts that span no more than dims + 10 directions are decomposed exactly whatever it is. ValueError where no word
    is left, or for an argument out of range.
    """
    for name, value in (("dims", dims), ("max_words", max_words)):
        if value < 1:
            raise ValueError(f"{name}: {value} is too small; at least 1")
    if not 0 < common <= 1:
        raise ValueError(f"common: {common} is no share above 0 and at most 1")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling: {scaling!r} is not one of {', '.join(SCALINGS)}")
    counts = [count(text) for text in texts]
    texts_with = Counter(word for found in counts for word in found)
    telling = [word for word, times in texts_with.items() if times <= common * len(counts)]
    words = sorted(sorted(telling, key=lambda word: (-texts_with[word], word))[:max_words])
    if not words:
        raise ValueError(f"texts: {len(counts)} of them, and no word of two letters that at most {common:.0%} of them have")
    number = {word: i for i, word in enumerate(words)}
    idf = np.log((1 + len(counts)) / (1 + np.array([texts_with[word] for word in words]))) + 1
    rows = [_weighted(_known(found, number), idf) for found in counts]
    components = truncated_svd(rows, len(words), dims, seed)
    points = _project(rows, components)
    deviation = points.std(0)
    deviation[deviation < 1e-12] = 1  # a coordinate that is the same in all texts
    made = Embedding(words, idf, components, points.mean(0), deviation, scaling)
    return made, made.scaled(points)


def count(text: str) -> Counter[str]:
    return Counter(WORD.findall(text.lower()))


def truncated_svd(rows: list[Row], width: int, dims: int, seed: int) -> np.ndarray:
    """(V, d): the right singular vectors of the largest singular values of a sparse matrix (N, V), `width` being V.

    A random subspace of dims + 10 directions is multiplied by A^T A and made orthonormal again, `PASSES` times; then the
    decomposition within it is exact. The sign of a vector makes its largest entry positive. Vectors of singular values
    below 1e-9 of the largest are left away.
    """
    size = min(dims + SPARE, width, len(rows))
    subspace = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, size)))[0]  # (V, r)
    for _ in range(PASSES):
        image = np.zeros_like(subspace)  # A^T A times the subspace
        for ids, values in rows:
            image[ids] += np.outer(values, values @ subspace[ids])
        subspace = np.linalg.qr(image)[0]
    _, singular, turned = np.linalg.svd(_project(rows, subspace), full_matrices=False)
    kept = min(dims, int((singular > 1e-9 * singular[0]).sum()))
    vectors = subspace @ turned[:kept].T  # (V, d)
    return vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(kept)])


def _project(rows: Iterable[Row], vectors: np.ndarray) -> np.ndarray:
    """(N, r): sparse rows (N, V) times vectors (V, r)."""
    return np.array([values @ vectors[ids] for ids, values in rows]).reshape(-1, vectors.shape[1])


def _known(found: Counter[str], number: dict[str, int]) -> Row:
    """The counts of the words that have a number."""
    pairs = sorted((number[word], times) for word, times in found.items() if word in number)
    return np.array([i for i, _ in pairs], np.int64), np.array([times for _, times in pairs], np.float64)


def _weighted(row: Row, idf: np.ndarray) -> Row:
    """The tf-idf of counts, of length 1 unless there are none."""
    ids, times = row
    values = times * idf[ids]
    return ids, values / max(np.linalg.norm(values), 1e-300)
