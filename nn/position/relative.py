import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn.checks import at_least
from nn.context import Context
from nn.position.none import NoPosition


class RelativePosition(NoPosition):
    """One table of vectors for the distances between tokens, which the `deberta` layers of a model share.

    He et al. 2020, "DeBERTa" (arXiv:2006.03654), eq. 3: distance i - j has row clamp(i - j + span, 0, 2 span - 1). With
    `buckets` (version 2) distances beyond half of them fall into buckets that grow with the logarithm, up to `span`; the
    table then has 2 buckets rows. `norm`: the rows pass through a LayerNorm first (version 2 again).
    """

    def __init__(self, dim: int, *, span: int = 512, buckets: int = 0, norm: bool = False):
        super().__init__()
        at_least(1, span=span)
        at_least(0, buckets=buckets)
        if buckets and span <= buckets // 2 + 1:
            raise ValueError(f"span: {span} is no more than the {buckets // 2} distances that have buckets of their own")
        self.span, self.buckets = span, buckets
        self.table = nn.Embedding(2 * (buckets or span), dim)
        self.norm = nn.LayerNorm(dim, eps=1e-7) if norm else None

    def rows(self, distances: Tensor) -> Tensor:
        """Integers of any shape -> rows of the table, of the same shape."""
        if self.buckets:
            half = self.buckets // 2
            far = distances.abs().clamp(min=half).double() / max(half, 1)
            steps = (far.log() / math.log((self.span - 1) / half) * (half - 1)).ceil().long() + half
            distances = torch.where(distances.abs() <= half, distances, steps * distances.sign())
        limit = self.table.num_embeddings
        return (distances + limit // 2).clamp(0, limit - 1)

    def relative(self, context: Context, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """The table (R, dim), and the row of each pair of a query and a key, (T, S) int64; queries are the last of the keys."""

        def make() -> Tensor:
            at = torch.arange(keys, device=context.tokens.device)
            return self.rows(at[keys - queries :, None] - at)

        table = self.table.weight
        if self.norm is not None:
            table = F.layer_norm(table, table.shape[-1:], self.norm.weight, self.norm.bias, self.norm.eps)
        return table, context.once(("relative", self, queries, keys), make)
