import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention
from nn.attention.documents import document_spans
from nn.attention.visible import visible
from nn.context import Context
from nn.position.none import NoPosition

WIDEST = 256  # the widest heads that kernels/attention.py takes

# B batch, H query heads, K key/value heads, T queries, S keys, D head dim, Dv that of the values


class Attend:
    """Softmax attention with what a position encoding adds to the scores: slopes (ALiBi) or a bias of its own."""

    def __init__(self, position: NoPosition | None, heads: int, scale: float):
        position = position or NoPosition()
        self.heads, self.scale, self.bias, self.slopes = heads, scale, position.bias, position.slopes(heads)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """(B, H, T, Dv) of q (B, H, T, D), k (B, K, S, D), v (B, K, S, Dv); the queries are the last T of S tokens.

        Scores are held whole only where the position encoding has a bias of its own or heads are wider than 256.
        """
        (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
        own_bias = self.bias(context, self.heads, T, S) is not None
        alone = T == 1 and context.documents is None and self.slopes is None and not own_bias  # it sees all keys there are
        folded = q.reshape(B, K, H // K * T, D)  # the heads that share a key, as more queries of it: no key is copied for them
        if max(D, v.shape[-1]) <= WIDEST and not own_bias:
            if alone:
                return attention(folded, k, v, causal=False, scale=self.scale).reshape(B, H, T, v.shape[-1])
            slopes, spans = None if self.slopes is None else self.slopes.to(q.device), document_spans(context)
            return attention(q, k, v, causal=context.causal, alibi=slopes, scale=self.scale, shared_spans=spans)
        mask = None if alone else self.mask(context, T, S, q.dtype)
        mask = mask if alone else mask.expand(-1, H, -1, -1).reshape(len(mask), K, H // K * T, S)
        return F.scaled_dot_product_attention(folded, k, v, mask, scale=self.scale).reshape(B, H, T, v.shape[-1])

    def mask(self, context: Context, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
        """(1 or B, 1 or H, T, S): bool, or numbers where something stands beside the scores."""
        seen, added = visible(context, queries, keys)[:, None], self.added(context, queries, keys)
        return seen if added is None else added.to(dtype).masked_fill(~seen, -torch.inf)

    def added(self, context: Context, queries: int, keys: int, rows: slice = slice(None)) -> Tensor | None:
        """(1 or B, H, T, S): what stands beside the scores, or None; with `rows`, of these queries only."""
        bias = self.bias(context, self.heads, queries, keys)
        bias = None if bias is None else bias[:, :, rows]
        if self.slopes is None:
            return bias
        device = context.tokens.device
        i, j = torch.arange(keys - queries, keys, device=device)[rows, None], torch.arange(keys, device=device)
        lost = self.slopes.to(device)[:, None, None] * (i - j).abs()
        return -lost[None] if bias is None else bias - lost
