import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nn.attention.attend import Attend
from nn.attention.cache import KVCache
from nn.attention.visible import visible
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.position.none import NoPosition

QUERY_BLOCK = 128  # queries whose weights are held at a time
LOWEST = -30.0  # below it log(softplus(s)) is s

# B batch, T time, S keys (earlier ones and this call's), C model dim, H heads, D head dim
# n (B or 1, 1, T, 1) how many keys a query sees


class NormalisedAttention(nn.Module):
    """Attention whose weights are another function of the scores than softmax; n is how many keys a query sees.

    softplus  A = softplus(c s) / sum softplus(c s): LSSA, Gao et al. 2025, "Softplus Attention with Re-weighting Boosts
              Length Extrapolation" (arXiv:2501.13428), with `length_scale`, c = log(D) log(n) / sqrt(D)
    softmax   A = exp(c s) / sum exp(c s)
    sigmoid   A = sigmoid(c s - log n), not normalised (Ramapuram et al. 2024, arXiv:2409.04431)
    relu      A = relu(c s) / n, not normalised (Wortsman et al. 2023, arXiv:2309.08586)

    s = q . k, and c = 1 / sqrt(D) without `length_scale`. Of normalised weights `power` p and `offset` o make LSSAR:
    relu(n A - o)^p, normalised again, so that weights of up to o / n become 0; p = 1, o = 0 changes nothing, and 0 <= o < 1
    leaves each row its largest weight. They are meant for inference and have no parameters. Which p and o to take, and that
    n counts what a query sees, are choices; the paper's length is that of the row.

    The T x S weights are stored, a block of 128 queries at a time; where a backward pass follows, longer calls work each block
    out again. The mask, a byte a pair, is held whole, once for all layers.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is a KVCache of 2 H D numbers a token.
    """

    together = ("query", "key", "value")

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        normaliser: Literal["softmax", "softplus", "sigmoid", "relu"] = "softplus",
        length_scale: bool = False,
        power: float = 1.0,
        offset: float = 0.0,
    ):
        super().__init__()
        at_least(1, heads=heads, head_dim=head_dim, power=power)
        if normaliser not in ("softmax", "softplus", "sigmoid", "relu"):
            raise ValueError(f"normaliser: softmax, softplus, sigmoid or relu, not {normaliser!r}")
        if not 0 <= offset < 1:
            raise ValueError(f"offset: {offset} is not in [0, 1)")
        if not math.isfinite(power):
            raise ValueError(f"power: {power} is not finite")
        if normaliser in ("sigmoid", "relu") and (power != 1 or offset != 0):
            raise ValueError(f"{'power' if power != 1 else 'offset'}: for softmax and softplus, not for {normaliser}")
        self.heads, self.head_dim = heads, width_of_heads(dim, heads, head_dim)
        self.normaliser, self.length_scale, self.power, self.offset = normaliser, length_scale, power, offset
        self.rotate = (position or NoPosition()).rotate  # the function alone: the encoding's parameters are the model's
        self.added = Attend(position, heads, 1.0).added
        inner = heads * self.head_dim
        self.query, self.key, self.value = (Linear(dim, inner, bias=False) for _ in range(3))
        self.out = output_projection(inner, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (u.unflatten(-1, (self.heads, -1)) for u in project(x, self.query, self.key, self.value))
        q, k = self.rotate(q, context), self.rotate(k, context)
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))  # (B, H, T, D)
        if context.state is not None:
            k, v = (u.to(q.dtype) for u in context.state.append(k, v))  # (B, H, S, D)
        T, S = q.shape[2], k.shape[2]
        seen, parts = visible(context, T, S)[:, None], []
        for start in range(0, max(T, 1), QUERY_BLOCK):
            rows = slice(start, start + QUERY_BLOCK)
            block = q[:, :, rows], k, v, seen[:, :, rows], self.added(context, T, S, rows)
            if torch.is_grad_enabled() and T > QUERY_BLOCK:
                parts.append(checkpoint(self.mix, *block, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self.mix(*block))
        return self.out(torch.cat(parts, 2).transpose(1, 2).flatten(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, added: Tensor | None) -> Tensor:
        """(B, H, t, D) of a block of queries (B, H, t, D)."""
        return self.weights(q @ k.mT, seen, added).to(v.dtype) @ v

    def weights(self, scores: Tensor, seen: Tensor, added: Tensor | None = None) -> Tensor:
        """q . k (B, H, T, S) -> A of the same shape, float32 or wider; seen (B or 1, 1, T, S) bool, `added` to c s or None."""
        s = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.head_dim**-0.5
        n = seen.sum(-1, keepdim=True).to(s.dtype)
        if self.length_scale:
            s = s * (math.log(self.head_dim) * n.log())
        s = s if added is None else s + added
        if self.normaliser == "sigmoid":
            return torch.sigmoid(s - n.log()) * seen
        if self.normaliser == "relu":
            return s.relu() / n * seen
        if self.normaliser == "softplus":  # softplus = exp(log softplus): normalised by softmax, no row of it underflows
            s = torch.where(s < LOWEST, s, F.softplus(s.clamp(min=LOWEST)).log())
        return self.reweighted(s.masked_fill(~seen, -torch.inf).softmax(-1), n)

    def reweighted(self, a: Tensor, n: Tensor) -> Tensor:
        """relu(n A - offset)^power, normalised; divided by its largest first, so that no power overflows."""
        if self.power == 1 and self.offset == 0:
            return a
        a = (n * a - self.offset).relu()
        a = (a / a.amax(-1, keepdim=True).detach()) ** self.power
        return a / a.sum(-1, keepdim=True)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> KVCache:
        return KVCache(batch, self.heads, max_len, self.head_dim, dtype=dtype, device=device)

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return 2 * batch * self.heads * max_len * self.head_dim * dtype.itemsize

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of scores and weighted sum for `queries` x `keys` pairs, beside those of the projections."""
        return 4 * queries * keys * self.heads * self.head_dim
