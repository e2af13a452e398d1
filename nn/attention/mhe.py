from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from nn.attention.attend import Attend
from nn.attention.cache import KVCache
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.position.none import NoPosition

# B batch, T time, S keys (earlier ones and this call's), C model dim, H heads, D head dim


class MHE(nn.Module):
    """Head embeddings: all heads share one projection, and each has only a learned vector of its own for q, k and v.

    Xue and Aletras 2023, "Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head
    Attention" (arXiv:2310.07911). `kind` add: q_h = W x + e_h; mul: q_h = (W x) * (e_h + 1); keys and values likewise.
    The position turns what comes out. That is 3 H D parameters more than attention with a single head, beside W_out.

    Weights sum to 1, so the embedding of the values is applied to what comes out of attention. Keys of all heads are made
    for each call, since a rotation does not commute with the embedding. The embeddings begin normal with standard deviation
    0.5, the size that inputs of unit variance have after the projections of `--init fan_in`: a choice; equal ones would stay
    equal. Shapes: x (B, T, C) -> (B, T, C). The decoding state is a KVCache of the shared vectors: 2 D numbers a token.
    """

    together = ("query", "key", "value")
    elementwise = ("query_heads", "key_heads", "value_heads")

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        kind: Literal["add", "mul"] = "mul",
    ):
        super().__init__()
        at_least(1, heads=heads, head_dim=head_dim)
        if kind not in ("add", "mul"):
            raise ValueError(f"kind: add or mul, not {kind!r}")
        self.heads, self.head_dim, self.kind = heads, width_of_heads(dim, heads, head_dim), kind
        self.rotate = (position or NoPosition()).rotate  # the function alone: the encoding's parameters are the model's
        self.attend = Attend(position, heads, self.head_dim**-0.5)
        self.query, self.key, self.value = (Linear(dim, self.head_dim, bias=False) for _ in range(3))
        self.query_heads, self.key_heads, self.value_heads = (
            nn.Parameter(torch.empty(heads, self.head_dim)) for _ in range(3)
        )
        self.out = output_projection(heads * self.head_dim, dim)
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        """Head embeddings normal of standard deviation 0.5, whatever the initialisation of the other weights."""
        for embeddings in (self.query_heads, self.key_heads, self.value_heads):
            nn.init.normal_(embeddings, std=0.5, generator=generator)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (u[:, :, None] for u in project(x, self.query, self.key, self.value))  # (B, T, 1, D)
        where = context
        if context.state is not None:
            k, v = (u.to(q.dtype).transpose(1, 2) for u in context.state.append(k.transpose(1, 2), v.transpose(1, 2)))
            where = key_context(context, k.shape[1])
        q = self.rotate(self.embedded(q, self.query_heads), context)  # (B, T, H, D)
        k = self.rotate(self.embedded(k, self.key_heads), where)  # (B, S, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2).expand(-1, self.heads, -1, -1)
        y = self.attend(q, k, v, context).transpose(1, 2)  # (B, T, H, D)
        return self.out(self.embedded(y, self.value_heads).flatten(2))

    def embedded(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, T, 1 or H, D) with the embeddings (H, D) -> (B, T, H, D)."""
        embedding = embedding.to(x.dtype)
        return x + embedding if self.kind == "add" else x * (embedding + 1)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> KVCache:
        return KVCache(batch, 1, max_len, self.head_dim, dtype=dtype, device=device)

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return 2 * batch * max_len * self.head_dim * dtype.itemsize

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of scores and weighted sum for `queries` x `keys` pairs, beside those of the projections."""
        return 4 * queries * keys * self.heads * self.head_dim


def key_context(context: Context, keys: int) -> Context:
    """The same call with the positions of all keys so far, which in decoding follow one another."""
    positions = context.positions
    if positions.shape[-1] == keys:
        return context

    def make() -> Context:
        last = positions[..., -1:] if positions.shape[-1] else positions.new_zeros(1)  # without a query, none asks
        return replace(context, positions=last + torch.arange(1 - keys, 1, device=positions.device), shared={})

    return context.once(("key context", keys), make)
