import torch
from torch import Tensor, nn

from nn.attention.cache import KVCache
from nn.attention.visible import visible
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.position.none import NoPosition

# B batch, T time, S keys, C model dim, H heads, D head dim, R rows of the table of distances


class DeBERTa(nn.Module):
    """Disentangled attention: content meets content, content meets distance, distance meets content.

    He et al. 2020, "DeBERTa: Decoding-enhanced BERT with Disentangled Attention" (arXiv:2006.03654), eq. 4:

        A_ij = q_i . k_j + q_i . K_r(i - j) + k_j . Q_r(i - j),    scaled by 1 / sqrt(D (1 + terms with distance))

    K_r and Q_r are made from the table of the model's position encoding `relative`; without it only content is left. The
    last term's distance has the sign of the authors' code, the paper writes j - i: the same with the rows in reverse.
    `c2p`, `p2c`: leave a term away. `shared`: distances pass through the projections of the content (version 2).
    `absolute` n > 0: in this layer queries are made of x + P, with a learned vector for each of n positions: the enhanced
    mask decoder, for the last layers of an encoder (there the last two share their weights, here they do not).

    Shapes: x (B, T, C) -> (B, T, C). Scores are held whole, T S H numbers, since both extra terms are gathered; what is
    gathered from takes T R H. The decoding state is a KVCache of 2 H D numbers a token.
    """

    together = ("key", "value")

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        bias: bool = True,
        c2p: bool = True,
        p2c: bool = True,
        shared: bool = False,
        absolute: int = 0,
    ):
        super().__init__()
        at_least(1, heads=heads, head_dim=head_dim)
        at_least(0, absolute=absolute)
        self.heads, self.head_dim = heads, width_of_heads(dim, heads, head_dim)
        inner = heads * self.head_dim
        self.relative = getattr(position, "relative", None)  # the function alone: the table is the model's
        self.c2p, self.p2c = (wanted and self.relative is not None for wanted in (c2p, p2c))
        self.scale = (self.head_dim * (1 + self.c2p + self.p2c)) ** -0.5
        self.query, self.value = (Linear(dim, inner, bias=bias) for _ in range(2))
        self.key = Linear(dim, inner, bias=bias and self.p2c)  # without that term it would add the same to all of a row
        own = not shared
        self.distance_key = Linear(dim, inner, bias=False) if self.c2p and own else None
        self.distance_query = Linear(dim, inner, bias=bias) if self.p2c and own else None
        self.absolute = nn.Embedding(absolute, dim) if absolute else None
        self.out = output_projection(inner, dim, bias=bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        k, v = map(self.heads_of, project(x, self.key, self.value))  # (B, H, T, D)
        q = self.heads_of(self.query(self.placed(x, context)))
        if context.state is not None:
            k, v = (u.to(q.dtype) for u in context.state.append(k, v))
        T, S = q.shape[2], k.shape[2]
        scores = q @ k.mT
        if self.c2p or self.p2c:
            table, rows = self.relative(context, T, S)  # (R, C), (T, S)
            if self.c2p:
                keys = self.heads_of((self.distance_key or self.key)(table)[None])  # (1, H, R, D)
                scores = scores + (q @ keys.mT).gather(-1, rows.expand(*q.shape[:2], T, S))
            if self.p2c:
                queries = self.heads_of((self.distance_query or self.query)(table)[None])
                scores = scores + (k @ queries.mT).gather(-1, rows.T.expand(*q.shape[:2], S, T)).mT
        scores = (self.scale * scores).masked_fill(~visible(context, T, S)[:, None], -torch.inf)
        return self.out((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))

    def placed(self, x: Tensor, context: Context) -> Tensor:
        """What queries are made of: x, in the enhanced mask decoder with its absolute position."""
        if self.absolute is None:
            return x
        room = self.absolute.num_embeddings
        if context.positions.numel() and int(context.positions.max()) >= room:
            raise ValueError(f"absolute: {room} positions, but the text has more")
        return x + self.absolute(context.positions).to(x.dtype)

    def heads_of(self, x: Tensor) -> Tensor:
        """(B, T, H D) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> KVCache:
        return KVCache(batch, self.heads, max_len, self.head_dim, dtype=dtype, device=device)

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return 2 * batch * self.heads * max_len * self.head_dim * dtype.itemsize

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of scores and weighted sum for `queries` x `keys` pairs, beside those of the projections."""
        return 4 * queries * keys * self.heads * self.head_dim
