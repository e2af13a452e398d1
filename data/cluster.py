"""Cluster a corpus, so that an expert can learn each part: the first step of Cluster-Branch-Train-Merge.

    python -m data.cluster --data python --k 4 --out clusters
    python train.py --data python --steps 1000 --out runs/seed
    python train.py --weights runs/seed --data clusters/cluster-0.jsonl --val-data clusters/validation.jsonl --out runs/0
    …                                                   and so for each cluster, on any machine, at any time
    python -m data.contexts --clusters clusters --tokenizer runs/seed/step-001000/tokenizer --out contexts.safetensors
    python -m models.ensemble contexts.safetensors --experts runs/0,runs/1,runs/2,runs/3 --top-k 1,2,4

Texts become points (`data.tfidf`: tf-idf, SVD, one scale), points become clusters of equal size (`data.balanced`); a text
that comes later belongs to the nearest centre, whatever that does to the sizes. Gururangan, Li, Lewis, Shi, Althoff, Smith and
Zettlemoyer 2023, "Scaling Expert Language Models with Unsupervised Domain Discovery" (arXiv:2303.14177).

Clusters are made of the training documents of `--data` alone, and the files hold these alone; the validation documents, which
`train.py --data` would keep from the same spec, lie beside them.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from data.balanced import balanced_kmeans, squared_distances
from data.cache import new_folder, write_file
from data.corpus import training_documents, validation_documents
from data.tfidf import SCALINGS, Embedding, fit_embedding

WORDS_FILE, NUMBERS_FILE = "clusters.json", "clusters.safetensors"
NUMBERS = ("idf", "components", "mean", "deviation")  # of the embedding


class Clusters:
    """k centres among the points of texts. `labels` (N,) int64: where the texts of the fit were put, in equal parts."""

    def __init__(self, embedding: Embedding, centres: np.ndarray, labels: np.ndarray):
        self.embedding, self.centres, self.labels = embedding, centres, labels

    @classmethod
    def fit(
        cls,
        texts: Iterable[str],
        k: int,
        seed: int = 0,
        *,
        dims: int = 100,
        max_words: int = 20_000,
        common: float = 0.5,
        scaling: str = "unit",
        restarts: int = 4,
    ) -> "Clusters":
        """Clusters whose numbers of texts differ by at most 1. The texts are read once; the same seed gives the same clusters.

        ValueError for a k outside 1 to the number of texts, and as `fit_embedding` and `balanced_kmeans` say.
        """
        options = dict(dims=dims, max_words=max_words, common=common, scaling=scaling)
        embedding, points = fit_embedding(texts, **options, seed=seed)
        labels, centres = balanced_kmeans(points, k, seed=seed, restarts=restarts)
        return cls(embedding, centres, labels)

    def distances(self, texts: Iterable[str]) -> np.ndarray:
        """(n, k) float64: from each text to each centre."""
        return np.sqrt(squared_distances(self.embedding(texts), self.centres))

    def assign(self, texts: Iterable[str]) -> np.ndarray:
        """(n,) int64: the nearest centre of each text, without regard to balance."""
        return self.distances(texts).argmin(1)

    def save(self, folder: str | os.PathLike) -> None:
        """Write clusters.json (words, scaling) and clusters.safetensors (every number, exactly) into a folder."""
        arrays = {name: getattr(self.embedding, name) for name in NUMBERS} | dict(centres=self.centres, labels=self.labels)
        words = dict(format="rosetta clusters", scaling=self.embedding.scaling, words=self.embedding.words)
        write_file(Path(folder) / NUMBERS_FILE, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
        write_file(Path(folder) / WORDS_FILE, json.dumps(words, ensure_ascii=False).encode() + b"\n")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Clusters":
        """Read back what `save` wrote. ValueError naming the file that is missing, damaged or does not fit the other."""
        place = Path(folder)
        try:
            arrays = load_file(place / NUMBERS_FILE)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"clusters: {str(place / NUMBERS_FILE)!r} cannot be read: {error}") from None
        try:
            told = json.loads((place / WORDS_FILE).read_text(encoding="utf-8"))
            words, scaling = list(told["words"]), told["scaling"]
            embedding = Embedding(words, *(arrays[name] for name in NUMBERS), scaling)
            (v, d), (k, width) = embedding.components.shape, arrays["centres"].shape
            fits = len(words) == len(embedding.idf) == v and len(embedding.mean) == len(embedding.deviation) == d == width
            if not fits or k < 1 or scaling not in SCALINGS or told["format"] != "rosetta clusters":
                raise ValueError
            return cls(embedding, arrays["centres"], arrays["labels"])
        except OSError as error:
            raise ValueError(f"clusters: {str(place / WORDS_FILE)!r} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            files = f"{WORDS_FILE} and {NUMBERS_FILE} in {str(place)!r}"
            raise ValueError(f"clusters: {files} are not of clusters of ours") from None


class Parser(argparse.ArgumentParser):
    """Mistakes are one line; flags are not abbreviated."""

    def __init__(self, module: str, doc: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"python -m {module}", description=doc, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser("data.cluster", __doc__)
    parser.add_argument("--data", default="python", metavar="…", help="the corpus, as for train.py [python]")
    parser.add_argument("--val-data", default="", metavar="…", help="documents for validation [a tenth of the corpus]")
    parser.add_argument("--k", type=int, required=True, metavar="N", help="how many clusters")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where they go; must not exist yet")
    parser.add_argument("--dims", type=int, default=100, metavar="N", help="of the SVD, at most [100]")
    parser.add_argument("--max-words", type=int, default=20_000, metavar="N", help="of the vocabulary, at most [20000]")
    parser.add_argument("--common", type=float, default=0.5, metavar="X", help="words in a larger share of texts are left out "
                        "[0.5]")  # fmt: skip
    parser.add_argument("--scaling", default="unit", choices=SCALINGS, help="of the points: each to length 1 [unit], or each "
                        "coordinate to mean 0 and deviation 1")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws [0]")
    args = parser.parse_args(argv)
    try:
        write_clusters(args)
    except (ValueError, OSError) as error:
        print(f"data.cluster: {error}", file=sys.stderr)
        return 2
    return 0


def write_clusters(args: argparse.Namespace) -> None:
    """Make the folder, whole or not at all, and print each cluster's size and the words that set it apart."""
    if Path(args.out).exists():
        raise ValueError(f"out: {args.out!r} exists already")
    texts = (document.text for document in training_documents(args.data, args.val_data or None))
    options = dict(dims=args.dims, max_words=args.max_words, common=args.common, scaling=args.scaling)
    clusters = Clusters.fit(texts, args.k, args.seed, **options)
    sizes = np.zeros(args.k, np.int64)
    with new_folder(args.out) as folder:
        clusters.save(folder)
        files = [(folder / f"cluster-{j}.jsonl").open("w", encoding="utf-8") for j in range(args.k)]
        try:
            documents = training_documents(args.data, args.val_data or None)
            for document, label in zip(documents, clusters.labels, strict=True):
                files[label].write(json.dumps(document._asdict()) + "\n")
                sizes[label] += len(document.text)
        finally:
            for file in files:
                file.close()
        with (folder / "validation.jsonl").open("w", encoding="utf-8") as file:
            for document in validation_documents(args.data, args.val_data or None):
                file.write(json.dumps(document._asdict()) + "\n")
    print(f"{'cluster':>8} {'documents':>10} {'characters':>12}  words")
    for j, words in enumerate(telling_words(clusters)):
        print(f"{j:>8} {(clusters.labels == j).sum():>10} {sizes[j]:>12,}  {' '.join(words)}")
    print(f"wrote {args.out}")


def telling_words(clusters: Clusters, count: int = 8) -> list[list[str]]:
    """For each cluster the words whose weight is highest above that in the other centres."""
    centres = clusters.centres * (clusters.embedding.deviation if clusters.embedding.scaling == "standard" else 1)
    weights = (centres - centres.mean(0)) @ clusters.embedding.components.T  # (k, V)
    return [[clusters.embedding.words[i] for i in np.argsort(-row, kind="stable")[:count]] for row in weights]


if __name__ == "__main__":
    sys.exit(main())
