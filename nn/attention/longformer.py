from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import attention
from nn.attention.cache import KVCache, WindowCache
from nn.attention.documents import document_spans
from nn.attention.gqa import GQA
from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, project
from nn.position.none import NoPosition

# B batch, T time, n global tokens, C model dim, H heads, D head dim


@dataclass
class LongformerState:
    """The keys and values that later tokens see, and those that the n global ones see of each other."""

    tokens: WindowCache
    first: KVCache

    def bytes(self) -> int:
        return self.tokens.bytes() + self.first.bytes()


class Longformer(GQA):
    """A window of attention, and a few global tokens with projections of their own that see and are seen by all.

    Beltagy et al. 2020, "Longformer: The Long-Document Transformer" (arXiv:2004.05150), section 3.1. `window`: a token sees
    those less than this many tokens away, on both sides in an encoder (the paper's w is 2 (window - 1)). The first
    `global_tokens` of a text are global: they read all of it, and are read by all. A layer's receptive field grows by the
    window; the cost is linear in T. Li et al. 2022, "Clinical-Longformer" (arXiv:2201.11838), read 4,096 tokens so.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state holds 2 H D numbers for each of global_tokens + window - 1 tokens,
    and for each global one once more.
    """

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        bias: bool = False,
        window: int = 257,
        global_tokens: int = 4,
    ):
        at_least(1, global_tokens=global_tokens)
        super().__init__(
            dim, position, heads=heads, head_dim=head_dim, bias=bias, window=window, global_tokens=global_tokens
        )
        inner = heads * self.head_dim
        self.query_global, self.key_global, self.value_global = (Linear(dim, inner, bias=bias) for _ in range(3))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.turned(project(x, self.query, self.key, self.value), context)
        start = 0
        if context.state is not None:
            start = context.state.tokens.length
            k, v = (u.to(q.dtype) for u in context.state.tokens.append(k, v))
        y = self.attend(q, k, v, context)
        if start < self.global_tokens:
            y = self.with_global(y, x, context, self.global_tokens - start)
        return self.out(y.transpose(1, 2).flatten(2))

    def with_global(self, y: Tensor, x: Tensor, context: Context, count: int) -> Tensor:
        """y (B, H, T, D) with the outputs of global tokens, among them the first `count` of x where it is one document."""
        spans = document_spans(context)
        read = x if spans is not None or not context.causal else x[:, :count]  # by a causal token no later one
        q, k, v = self.turned(project(read, self.query_global, self.key_global, self.value_global), context)
        if context.state is not None:
            k, v = (u.to(q.dtype) for u in context.state.first.append(k, v))
        if spans is not None:  # the first of each document, which see no further back than each other
            far = attention(q, k, v, window=self.global_tokens, scale=self.scale, shared_spans=spans)
            is_global = context.positions.expand(len(x), -1) < self.global_tokens
            return torch.where(is_global[:, None, :, None], far, y)
        far = attention(q[:, :, :count], k, v, causal=context.causal, scale=self.scale)
        return torch.cat([far, y[:, :, count:]], 2)

    def turned(self, projected: tuple[Tensor, ...], context: Context) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, T, H D) as (B, H, T, D), the first two turned by the position encoding."""
        q, k, v = map(self.heads_of, projected)
        if q.shape[1] < context.positions.shape[-1]:
            context = Context(context.tokens, context.positions[..., : q.shape[1]])
        return tuple(u.transpose(1, 2) for u in (self.rotate(q, context), self.rotate(k, context), v))

    def init_state(
        self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> LongformerState:
        options = dict(dtype=dtype, device=device)
        first = KVCache(batch, self.heads, min(max_len, self.global_tokens), self.head_dim, **options)
        return LongformerState(super().init_state(batch, max_len, **options), first)

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        first = 2 * batch * self.heads * min(max_len, self.global_tokens) * self.head_dim * dtype.itemsize
        return super().state_bytes(batch, max_len, dtype) + first
