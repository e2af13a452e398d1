"""How far each context is from each cluster: what weighs the experts of Cluster-Branch-Train-Merge, token by token.

    python -m data.contexts --clusters clusters --tokenizer runs/seed/step-001000/tokenizer --out contexts.safetensors

A context is the text of a window so far, from where its last document began. The distances are measured once, into a file of
windows that `python -m models.ensemble` reads: so models need no text, and text no models.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from data.cache import write_file
from data.cluster import Clusters, Parser
from data.corpus import documents
from data.loader import Batch, windows
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokens import Tokens, tokenize


def context_distances(clusters: Clusters, tokenizer: Tokenizer) -> Callable[[Sequence[Tensor]], Tensor]:
    """A function of contexts, each ids (t,) of any device: (n, k) float64 distances from the clusters' centres, on the CPU."""

    def distances(contexts: Sequence[Tensor]) -> Tensor:
        texts = [tokenizer.decode(last_document(context.tolist(), tokenizer.eot)) for context in contexts]
        return torch.from_numpy(clusters.distances(texts))

    return distances


def last_document(ids: list[int], eot: int) -> list[int]:
    """What stands behind the last mark of a new document."""
    return ids[len(ids) - ids[::-1].index(eot) :] if eot in ids else ids


def measured_windows(
    clusters: Clusters, tokenizer: Tokenizer, tokens: Tokens, *, seq_len: int, stride: int, limit: int | None = None
) -> dict[str, Tensor]:
    """The windows of a stream, and the distances of the contexts in them: what `python -m models.ensemble` reads.

    inputs, targets and documents (N, T) as `windows` has them; distances (N, P, k) float64, that with number p being of the
    context up to and with input p * stride, P = ceil(T / stride); stride () and token_bytes (V,) int64.
    """
    if stride < 1:
        raise ValueError(f"stride: {stride} is too small; at least 1")
    batches = windows(tokens, batch_size=64, seq_len=seq_len, limit=limit)
    found = {name: torch.cat(parts) for name, parts in zip(Batch._fields, zip(*batches, strict=True), strict=True)}
    measure, points = context_distances(clusters, tokenizer), range(0, seq_len, stride)
    distances = torch.stack([measure([row[: point + 1] for point in points]) for row in found["inputs"]])  # (N, P, k)
    sizes = torch.from_numpy(tokenizer.token_bytes)
    return found | dict(distances=distances, stride=torch.tensor(stride), token_bytes=sizes)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("data.contexts", __doc__)
    parser.add_argument("--clusters", required=True, metavar="FOLDER", help="what python -m data.cluster wrote")
    parser.add_argument("--tokenizer", required=True, metavar="…", help="that of the experts: a path, byte, or a tiktoken name")
    parser.add_argument("--data", default="", metavar="…", help="all of this text [validation.jsonl of the clusters]")
    parser.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens a window [256]")
    parser.add_argument("--stride", type=int, default=32, metavar="N", help="tokens from one measurement to the next [32]")
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="how many, spread over the text (0: all) [0]")
    parser.add_argument("--out", required=True, metavar="FILE", help="where they go; must not exist yet")
    args = parser.parse_args(argv)
    try:
        if Path(args.out).exists():
            raise ValueError(f"out: {args.out!r} exists already")
        clusters, tokenizer = Clusters.load(args.clusters), load_tokenizer(args.tokenizer)
        tokens = tokenize(lambda: documents(args.data or str(Path(args.clusters) / "validation.jsonl")), tokenizer)
        options = dict(seq_len=args.seq_len, stride=args.stride, limit=args.tokens or None)
        found = measured_windows(clusters, tokenizer, tokens, **options)
        write_file(args.out, save(found))
    except (ValueError, OSError) as error:
        print(f"data.contexts: {error}", file=sys.stderr)
        return 2
    rows, points, k = found["distances"].shape
    print(f"wrote {args.out}: {rows} windows of {args.seq_len} tokens, each {points} times measured from {k} clusters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
