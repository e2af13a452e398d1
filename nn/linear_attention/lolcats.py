import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear_attention import linear_attention
from nn.attention.cache import WindowCache
from nn.attention.documents import document_spans
from nn.attention.gqa import GQA
from nn.checks import at_least
from nn.context import Context
from nn.linear_attention.linear import SMALLEST
from nn.linear_attention.memory import looks_back_only
from nn.position.none import NoPosition

# B batch, T time, S keys (the window's earlier ones and this call's), C model dim, H query heads, K key/value heads, D head
# dim, W the feature map's columns, F features

BLOCK = 128  # queries whose window is worked out at once
SHARE = 0.1  # g at first, as in the authors' configurations


@dataclass
class LolCatsState:
    """The last `window` keys and values, and in h (B, H, F, D + 1) the sums over all that stood before them."""

    recent: WindowCache
    h: Tensor

    def bytes(self) -> int:
        return self.recent.bytes() + self.h.nbytes


class LolCats(GQA):
    """Softmax attention within a window and linear attention to all before it, in one sum: what `gqa` is linearised to.

    Zhang et al. 2024, "LoLCATs: On Low-Rank Linearizing of Large Language Models" (arXiv:2410.10254), section 3:

              sum_{n-w < i <= n} g exp(q_n.k_i / sqrt(D) - c_n) v_i + f(q_n)^T sum_{j <= n-w} f'(k_j) v_j^T
        y_n = ---------------------------------------------------------------------------------------------
              the same with 1 instead of each v

    with c_n the largest score in the window, so that g weighs the two parts whatever the size of the scores, and g the
    sigmoid of a learned number a head. Queries and keys are those of attention, turned by the position encoding; since their
    features are taken after it, beyond the window not only distances count.

    window   w, in tokens. Up to w tokens this is `gqa` of the same weights, whatever g; 0 is linear attention alone
    feature  f and f', of each query head its own, with learned A (D, W) and b: `hedgehog`, [softmax(u A + b),
             softmax(-u A - b)] (Zhang et al. 2024, "The Hedgehog & the Porcupine", arXiv:2402.04347), or `t2r`,
             relu(u A + b) (Kasai et al. 2021, arXiv:2103.13076); A begins as the identity, b as 0
    width    W; by default D

    The names of the other parameters are those of `gqa`, whose weights fit; its other options are as there. What a position
    encoding adds to scores (alibi, t5) counts in the window only. Keys and values are copied for the heads that share them.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state holds 2 w K D numbers and H F (D + 1), whatever the length; F is
    2 W, with t2r W. ValueError if asked to see what follows (causal=False).
    """

    elementwise = ("query_shift", "key_shift")

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        vocab_size: int | None = None,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: Literal["none", "unit", "head", "all"] = "none",
        qk_eps: float = 1e-6,
        value_embedding: bool = False,
        window: int = 64,
        feature: Literal["hedgehog", "t2r"] = "hedgehog",
        width: int | None = None,
    ):
        super().__init__(
            dim, position, vocab_size, heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, out_bias=out_bias,
            qk_norm=qk_norm, qk_eps=qk_eps, value_embedding=value_embedding,
        )  # fmt: skip
        at_least(0, window=window)
        at_least(1, width=width)
        self.window, self.feature = window, feature
        width = width or self.head_dim
        self.features = width if feature == "t2r" else 2 * width
        if self.features > 256 or self.head_dim > 255:
            raise ValueError(f"width: {self.features} features of heads of {self.head_dim}; at most 256, of heads of 255")
        self.query_map, self.key_map = (nn.Parameter(torch.empty(heads, self.head_dim, width)) for _ in range(2))
        self.query_shift, self.key_shift = (nn.Parameter(torch.empty(heads, width)) for _ in range(2))
        self.mix = nn.Parameter(torch.empty(heads)) if window else None  # g before the sigmoid
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        """The initial values that belong to the equation, whatever the initialisation of the other weights."""
        for matrix, shift in ((self.query_map, self.query_shift), (self.key_map, self.key_shift)):
            matrix.copy_(torch.eye(*matrix.shape[1:]))
            shift.zero_()
        if self.mix is not None:
            self.mix.fill_(math.log(SHARE / (1 - SHARE)))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.turned(x, context)
        if context.state is not None:
            k, v = (u.to(q.dtype) for u in context.state.recent.append(k, v))  # (B, K, S, D)
        return self.out(self.weighed(q, k, v, context).transpose(1, 2).flatten(2))

    def turned(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys and values (B, K, T, D), the first two turned by the position encoding."""
        looks_back_only(context)
        q, k, v = self.projected(x, context)
        return tuple(u.transpose(1, 2) for u in (self.rotate(q, context), self.rotate(k, context), v))

    def matrix(self, x: Tensor, context: Context) -> Tensor:
        """(B, H, T, T) of x (B, T, C): the weights by which the values are added up, held whole: what unit vectors become."""
        q, k, v = self.turned(x, context)
        units = torch.eye(x.shape[1], dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)  # (B, K, T, T)
        weights = torch.cat([self.weighed(q, k, columns, context) for columns in units.split(BLOCK, -1)], -1)
        return weights.to(torch.promote_types(weights.dtype, torch.float32))

    def weighed(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """(B, H, T, V) of queries (B, H, T, D), keys (B, K, S, D) and values (B, K, S, V): the equation above.

        Numerator and denominator are divided by g, which the window then does not need.
        """
        if self.window and k.shape[2] <= self.window:
            return self.attend(q, k, v, context)
        k, v = (u.repeat_interleave(self.heads // self.kv_heads, 1) for u in (k, v))  # (B, H, S, ·)
        spans = document_spans(context)
        starts = None if spans is None else spans[0]  # (B, T): where the document of each token begins
        sums = self.before_window(q, k, v, context, starts)  # (B, H, T, V + 1)
        if self.window:
            sums = self.in_window(q, k, v, context, starts) + (1 + torch.exp(-self.mix.to(sums.dtype)))[:, None, None] * sums
        return (sums[..., :-1] / sums[..., -1:].clamp(min=SMALLEST)).to(v.dtype)

    def before_window(self, q: Tensor, k: Tensor, v: Tensor, context: Context, starts: Tensor | None) -> Tensor:
        """f(q_n)^T sum_{j <= n-w} f'(k_j) [v_j, 1], (B, H, T, V + 1) in float32 at least.

        The keys come by `window` steps late, and those of an earlier document not at all.
        """
        T, state = q.shape[2], context.state
        gone = k.shape[2] - self.window  # of the keys here, how many the window leaves behind
        v = v[:, :, :gone].to(torch.promote_types(v.dtype, torch.float32))
        late = self.mapped(k[:, :, :gone], self.key_map, self.key_shift), F.pad(v, (0, 1), value=1.0)
        late = [F.pad(u, (0, 0, T - gone, 0)) for u in late]  # (B, H, T, F) and (B, H, T, V + 1)
        if starts is not None:
            same = torch.arange(T, device=q.device) - self.window >= starts  # (B, T)
            late[0] = late[0] * same[:, None, :, None]
        asked = self.mapped(q, self.query_map, self.query_shift)
        parts = (u.transpose(1, 2) for u in (asked, *late))
        options = dict(initial_state=None if state is None else state.h, documents=context.documents)
        sums, h = linear_attention(*parts, scale=1.0, **options)
        if state is not None:
            state.h.copy_(h)
        return sums.transpose(1, 2)

    def in_window(self, q: Tensor, k: Tensor, v: Tensor, context: Context, starts: Tensor | None) -> Tensor:
        """sum_{n-w < i <= n} exp(s_ni - c_n) [v_i, 1], (B, H, T, V + 1) in float32 at least; by blocks of queries."""
        (T, S), wide = (q.shape[2], k.shape[2]), torch.promote_types(v.dtype, torch.float32)
        bias, slopes = self.bias(context, self.heads, T, S), self.slopes
        parts = []
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            near = slice(max(0, S - T + start - self.window + 1), S - T + end)
            i, j = (torch.arange(a, b, device=q.device) for a, b in ((S - T + start, S - T + end), (near.start, near.stop)))
            apart = i[:, None] - j  # (t, s)
            scores = (q[:, :, start:end] @ k[:, :, near].mT).to(wide) * self.scale
            if bias is not None:
                scores = scores + bias[:, :, start:end, near]
            if slopes is not None:
                scores = scores - slopes.to(scores)[:, None, None] * apart
            seen = (apart >= 0) & (apart < self.window)
            if starts is not None:
                seen = seen & (j >= starts[:, None, start:end, None])  # (B, 1, t, s)
            scores = scores.masked_fill(~seen, -torch.inf)
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            values = weights.to(v.dtype) @ v[:, :, near]
            parts.append(torch.cat([values.to(wide), weights.sum(-1, keepdim=True)], -1))
        return torch.cat(parts, 2)

    def mapped(self, u: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
        """f(u), (B, H, T, F), of queries or keys (B, H, T, D)."""
        z = u @ matrix + shift[:, None]
        if self.feature == "t2r":
            return z.relu().to(u.dtype)
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1).to(u.dtype)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> LolCatsState:
        recent = WindowCache(
            batch, self.kv_heads, max_len, self.head_dim, first=0, last=self.window, dtype=dtype, device=device
        )
        h = torch.zeros(batch, self.heads, self.features, self.head_dim + 1, device=device)
        return LolCatsState(recent, h.to(torch.promote_types(dtype, torch.float32)))

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        recent = 2 * self.kv_heads * min(max_len, self.window) * self.head_dim
        sums = self.heads * self.features * (self.head_dim + 1)
        return batch * (recent * dtype.itemsize + sums * torch.promote_types(dtype, torch.float32).itemsize)

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of the window's scores and sum, of both feature maps, and of the matrix that is written and read."""
        near, maps = 2 * min(keys, self.window) * self.head_dim, 2 * self.head_dim * self.query_map.shape[-1]
        return 2 * queries * self.heads * (near + maps + 2 * self.features * (self.head_dim + 1))
