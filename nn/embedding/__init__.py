"""Layers that look something up by the tokens themselves; in a stack they stand as mixers `(x, context) -> y`."""

from nn.embedding.ngram import NgramEmbedding

EMBEDDINGS = {
    "ngram": NgramEmbedding,
}
