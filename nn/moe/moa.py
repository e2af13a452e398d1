from typing import Literal

import torch
from torch import Tensor, nn

from nn.attention.attend import Attend
from nn.attention.cache import KVCache
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, cast_once, project
from nn.moe import losses
from nn.moe.expert_choice import ExpertChoice
from nn.moe.experts import StackedLinear
from nn.moe.moe import make_router
from nn.moe.routing import Routing, counts_of
from nn.position.none import NoPosition

# B batch, T time, S keys (earlier ones and this call's), C model dim, N = B T tokens
# E experts, A choices a token, H query heads of an expert, K key/value heads, D head dim


class MoA(nn.Module):
    """A mixture of attention heads: experts with queries and outputs of their own attend to keys and values that all share.

    Zhang et al. 2022, "Mixture of Attention Heads: Selecting Attention Heads Per Token" (arXiv:2210.05144), as Shen et al.
    2024 have it in "JetMoE" (arXiv:2404.07413): of E experts, each H heads wide, a router takes the top k for a token, and

        y = sum over the chosen i of g_i Attention(x W_q^i, x W_k, x W_v) W_o^i,      g = softmax over the chosen logits

    Keys and values do not ask who is going to read them, so a token that goes to one expert sees tokens that went to others,
    and the decoding state is that of one attention layer, however many experts there are. The heads of a token's choices
    stand side by side in one attention: head h of every choice reads key h K / H, has the slope of ALiBi or the bias of h,
    and is turned alike. `router`, `balance`, `scope` and `z` are as in `moe`, whose losses and balances these are; a
    position encoding knows the H heads of an expert. JetMoE's code adds a learned vector to the output; here there is none.

    `kv_heads` are H unless given. Shapes: x (B, T, C) -> (B, T, C). The decoding state holds 2 K D numbers a token.
    ValueError for a router whose experts choose, which gives a token no fixed number of them.
    """

    together = ("key", "value")
    auxiliary: Tensor | None = None
    routing: Routing | None = None

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        vocab_size: int | None = None,
        layer: int = 1,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        experts: int = 8,
        top_k: int | None = None,
        router: str = "topk",
        balance: float = 0.01,
        scope: Literal["sequence", "micro", "global", "buffer"] = "micro",
        z: float = 0.001,
    ):
        super().__init__()
        at_least(1, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        at_least(0, balance=balance, z=z)
        kv_heads = kv_heads or heads
        if heads % kv_heads:
            raise ValueError(f"kv_heads: {heads} query heads cannot be shared among {kv_heads} key/value heads evenly")
        self.router = make_router(router, dim, experts=experts, top_k=top_k, vocab_size=vocab_size, layer=layer)
        if isinstance(self.router, ExpertChoice):
            raise ValueError("router: with expert_choice a token has no fixed number of heads; take one in which tokens choose")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width_of_heads(dim, heads, head_dim)
        self.top_k, self.balance, self.z = self.router.top_k, balance, z
        self.balance_loss = losses.Balance(scope, experts)
        position = position or NoPosition()
        self.rotate = position.rotate  # the function alone: the encoding's parameters are the model's
        self.attend = Attend(EachRepeated(position, self.top_k), heads * self.top_k, self.head_dim**-0.5)
        inner, shared = heads * self.head_dim, kv_heads * self.head_dim
        self.query = StackedLinear(experts, dim, inner, uses=self.top_k)
        self.key = Linear(dim, shared, bias=False)
        self.value = Linear(dim, shared, bias=False)
        self.out = StackedLinear(experts, inner, dim, uses=self.top_k, writes_residual=True)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        routing = self.router(x.flatten(0, 1), context)
        self.routing = routing.detached()
        if self.router.learns():
            weights = dict(balance=self.balance, z=self.z)
            self.auxiliary = losses.auxiliary(self.router, routing, self.balance_loss, sequences=x.shape[0], **weights)
        chosen = routing.experts.flatten()  # (N A,)
        places = dict(order=chosen.argsort(stable=True), ends=counts_of(chosen, self.router.experts).cumsum(0))
        q = self.queries(x, **places)  # (B, T, H A, D)
        k, v = (u.unflatten(-1, (self.kv_heads, -1)) for u in project(x, self.key, self.value))  # (B, T, K, D)
        q, k, v = (u.transpose(1, 2) for u in (self.rotate(q, context), self.rotate(k, context), v))  # (B, heads, T, D)
        if context.state is not None:
            k, v = (u.to(q.dtype) for u in context.state.append(k, v))  # (B, K, S, D); under autocast they may differ
        y = self.attend(q, k, v, context).transpose(1, 2)  # (B, T, H A, D)
        return self.outputs(y, routing.weights, **places).to(x.dtype).view_as(x)

    def queries(self, x: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        """(B, T, H A, D): of each choice by its expert, those of one head next to each other."""
        A = self.top_k
        q = self.query(cast_once(x).flatten(0, 1), ends, gather=order, fan_out=A, scatter=order)  # (N A, H D)
        return q.view(*x.shape[:2], A, self.heads, self.head_dim).transpose(2, 3).flatten(2, 3)

    def outputs(self, y: Tensor, weights: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        """(N, C) of what the heads say (B, T, H A, D): each choice through its expert, by its weight, and their sum."""
        A = self.top_k
        y = y.unflatten(2, (self.heads, A)).transpose(2, 3).reshape(-1, self.heads * self.head_dim)  # (N A, H D)
        return self.out(y, ends, gather=order, scatter=order, fan_in=A, scale=weights.flatten()[order])

    def after_step(self) -> None:
        """What is done once a step, after all its parts: its counts begin anew."""
        self.balance_loss.after_step()

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> KVCache:
        return KVCache(batch, self.kv_heads, max_len, self.head_dim, dtype=dtype, device=device)

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return 2 * batch * self.kv_heads * max_len * self.head_dim * dtype.itemsize

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of scores and weighted sum for `queries` x `keys` pairs, beside those of the projections."""
        return 4 * queries * keys * self.top_k * self.heads * self.head_dim


class EachRepeated:
    """What a position encoding adds to the scores, for heads of which each stands `times` times in a row."""

    def __init__(self, position: NoPosition, times: int):
        self.of, self.slopes_of, self.times = position.bias, position.slopes, times

    def slopes(self, heads: int) -> Tensor | None:
        slopes = self.slopes_of(heads // self.times)
        return None if slopes is None else slopes.repeat_interleave(self.times)

    def bias(self, context: Context, heads: int, queries: int, keys: int) -> Tensor | None:
        bias = self.of(context, heads // self.times, queries, keys)
        return None if bias is None else bias.repeat_interleave(self.times, 1)
