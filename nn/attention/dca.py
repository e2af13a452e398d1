from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from kernels.attention import attention, merge
from nn.attention.documents import document_spans
from nn.attention.gqa import GQA
from nn.checks import at_least
from nn.context import Context
from nn.position.none import NoPosition

# B batch, T time, S keys (earlier ones and this call's), C model dim, H query heads, K key/value heads, D head dim

Part = tuple[Context, tuple[Tensor, Tensor]]  # where the queries stand for some keys, and which keys: low, high (B, T)


class DCA(GQA):
    """Dual chunk attention: a model that was trained on `original` positions reads any length, with no further training.

    An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models" (arXiv:2402.17463), section 3. Positions
    are cut into chunks of s = `chunk` < c = `original`; the key at j is turned to j mod s. The query at i, with r = i mod s,
    is turned to r for the keys of its own chunk, to min(s + r, c - 1) for those of the one before, and to c - 1 for all
    earlier ones: distances up to min(s, c - s) are the true ones, and none is more than c - 1. Attention over the three
    sets of keys is merged by their log-sum-exp into one softmax.

    The parameters are those of `gqa`, whose weights fit; up to s tokens, and with a position encoding that does not turn
    queries and keys, it is `gqa`. A context is stretched further by `--position rope:factor=…`. Positions are counted from
    the start of a row or document. Shapes: x (B, T, C) -> (B, T, C). The decoding state holds 2 K D numbers a token.
    """

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: Literal["none", "unit", "head", "all"] = "none",
        chunk: int = 3072,
        original: int = 4096,
    ):
        super().__init__(dim, position, heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, qk_norm=qk_norm)
        at_least(1, chunk=chunk)
        if not chunk < original:
            raise ValueError(f"chunk: {chunk} tokens are not less than the original context of {original}")
        self.chunk, self.original = chunk, original
        kind = NoPosition if position is None else type(position)
        self.turns = kind.rotate is not NoPosition.rotate
        if self.turns and (kind.bias is not NoPosition.bias or self.slopes is not None):
            raise ValueError("position: dca takes rotary positions, without a bias on the scores beside them")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not self.turns:
            return super().forward(x, context)
        if not context.causal:
            raise ValueError("causal: dual chunk attention only looks back")
        if context.documents is not None and context.state is not None:
            raise ValueError("documents: a decoding state remembers one document a row; give one or the other")
        start = 0 if context.state is None else context.state.length
        name = ("dca", self.chunk, self.original, start)
        parts = context.once(name, lambda: self.parts(x, context, start))
        q, k, v = self.projected(x, context)
        k = self.rotate(k, parts[0][0])
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))  # (B, heads, T, D)
        if context.state is not None:
            k, v = (u.to(q.dtype) for u in context.state.append(k, v))  # (B, K, S, D); under autocast they may differ
        return self.out(self.merged(q, k, v, parts, context).transpose(1, 2).flatten(2))

    def parts(self, x: Tensor, context: Context, start: int) -> list[Part]:
        """Of the keys of a query's own chunk, of the one before and of earlier ones: those that may not be empty."""
        (B, T, _), s, c = x.shape, self.chunk, self.original
        row = torch.arange(start, start + T, device=x.device)
        spans = document_spans(context)
        first = torch.zeros_like(row) if spans is None else spans[0]  # where a token's document begins, (T,) or (B, T)
        within = (row - first) % s
        own = row - within  # where its chunk begins
        previous = torch.maximum(own - s, first)
        places = within, (within + s).clamp(max=c - 1), torch.full_like(within, c - 1)
        bounds = (own, row + 1), (previous, own), (first, previous)
        count = min(-(-(start + T) // s), 3)  # no document is longer than its row
        return [
            (
                replace(context, positions=place, shared={}),
                tuple(bound.expand(B, T).to(torch.int32).contiguous() for bound in pair),
            )
            for place, pair in zip(places[: max(count, 1)], bounds, strict=False)
        ]

    def merged(self, q: Tensor, k: Tensor, v: Tensor, parts: list[Part], context: Context) -> Tensor:
        """(B, H, T, D): one softmax over all keys (B, K, S, D), for which the queries (B, H, T, D) are turned part by part."""
        turned = lambda place: self.rotate(q.transpose(1, 2), place).transpose(1, 2)  # noqa: E731
        if len(parts) == 1:
            return self.attend(turned(parts[0][0]), k, v, context)
        y = lse = None
        for place, keys in parts:
            part = attention(turned(place), k, v, scale=self.scale, shared_spans=keys, with_lse=True)
            y, lse = part if y is None else merge(y, lse, *part)
        return y

    def is_plain(self) -> bool:
        """Never: a published family whose weights fit has no chunks."""
        return False
