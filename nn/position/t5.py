import math

import torch
from torch import Tensor, nn

from nn.checks import at_least
from nn.context import Context
from nn.position.none import NoPosition


class T5Bias(NoPosition):
    """Relative position biases: to each score a learned number is added, one for each head and range of distances.

    Raffel et al. 2019, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
    (arXiv:1910.10683), section 2.1. The first half of the `buckets` hold one distance each; in the others the ranges grow
    with the logarithm up to `max_distance`, and the last takes all beyond. An encoder has half of the buckets for keys
    before the query and half for those after it; a decoder has all for those before. The layers share one table, `heads`
    wide, as in T5, which also leaves its scores undivided (`gqa:scale=1`).
    """

    def __init__(self, *, buckets: int = 32, max_distance: int = 128, heads: int = 8):
        super().__init__()
        at_least(1, heads=heads)
        at_least(4, buckets=buckets)
        if buckets % 2:
            raise ValueError(f"buckets: {buckets} do not divide into those before a token and those after it")
        if not max_distance > buckets // 2:
            raise ValueError(f"max_distance: {max_distance} is not more than half of {buckets} buckets, which hold one each")
        self.heads, self.buckets, self.max_distance = heads, buckets, max_distance
        self.table = nn.Embedding(buckets, heads)

    def bucket(self, distance: Tensor, causal: bool) -> Tensor:
        """int64, the shape of `distance`: the bucket of key - query (0 … buckets - 1)."""
        count = self.buckets if causal else self.buckets // 2
        back = -distance.clamp(max=0) if causal else distance.abs()
        exact = count // 2  # buckets of one distance
        share = (back.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        ranges = (exact + (share * (count - exact)).long()).clamp(max=count - 1)
        return torch.where(back < exact, back, ranges) + (0 if causal else count * (distance > 0))

    def bias(self, context: Context, heads: int, queries: int, keys: int) -> Tensor:
        """(1, heads, queries, keys): what is added to the scores; the queries are the last of the keys."""
        if heads != self.heads:
            raise ValueError(f"heads: the table of t5 is made for {self.heads} heads, the mixer has {heads}")

        def make() -> Tensor:
            at = torch.arange(keys, device=self.table.weight.device)
            distance = at - at[keys - queries :, None]  # (queries, keys)
            return self.table(self.bucket(distance, context.causal)).permute(2, 0, 1)[None]

        return context.once((self, queries, keys), make)
