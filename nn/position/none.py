from torch import Tensor, nn

from nn.context import Context


class NoPosition(nn.Module):
    """No position encoding: order is known from the causal mask alone (or from a recurrence).

    Also the interface of the family. An encoding overrides what it does; a model calls `embed` once on the token
    embeddings, and every attention layer calls `rotate` on its queries and keys, and adds `slopes` or `bias` to its scores.
    Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length Generalization" (arXiv:2305.19466).
    """

    max_len: int | None = None  # how many positions there are, where that is limited

    def embed(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, dim) -> (B, T, dim): what is added to the embeddings."""
        return x

    def rotate(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, heads, head_dim) -> the same: what is done to queries and keys."""
        return x

    def slopes(self, heads: int) -> Tensor | None:
        """(heads,) float32: how much a score loses for each token of distance, or None."""
        return None

    def bias(self, context: Context, heads: int, queries: int, keys: int) -> Tensor | None:
        """(1 or B, heads, queries, keys): what is added to the scores, or None; the queries are the last of the keys."""
        return None
