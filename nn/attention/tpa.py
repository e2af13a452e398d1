import torch
from torch import Tensor, nn

from nn.attention.attend import Attend
from nn.attention.row_cache import RowCache
from nn.attention.visible import visible
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.position.none import NoPosition

# B batch, T time, S keys (earlier ones and this call's), C model dim, H heads, D head dim, R rank


class TPA(nn.Module):
    """Tensor product attention: each token's queries, keys and values are short sums of products of two vectors.

    Zhang et al. 2025, "Tensor Product Attention Is All You Need" (arXiv:2501.06425): the H x D matrix of a token's keys is
    K = 1/R sum_r a_r b_r^T with a_r of H and b_r of D numbers, both linear in x; queries and values likewise. The position
    turns the b alone, which turns K. With fixed a this is MHA, MQA or GQA; q_rank = 0 takes queries straight from x
    ("TPA-KVonly").

    Only the factors are remembered. A step of decoding makes neither K nor V of them: scores are
    1/R sum_r a_r[h] (q_h . b_r), and sums of values likewise; it holds the scores of its queries with all keys, whole.
    Training and the first call of a state make heads of the factors of this call, and keep no scores.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state holds (k_rank + v_rank)(H + D) numbers a token.
    """

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        q_rank: int = 6,
        k_rank: int = 2,
        v_rank: int = 2,
    ):
        super().__init__()
        at_least(1, heads=heads, head_dim=head_dim, k_rank=k_rank, v_rank=v_rank)
        at_least(0, q_rank=q_rank)
        self.heads, self.head_dim = heads, width_of_heads(dim, heads, head_dim)
        self.q_rank, self.k_rank, self.v_rank = q_rank, k_rank, v_rank
        self.rotate = (position or NoPosition()).rotate  # the function alone: the encoding's parameters are the model's
        self.attend = Attend(position, heads, self.head_dim**-0.5)
        self.query_a = Linear(dim, q_rank * heads, bias=False) if q_rank else None
        self.query_b = Linear(dim, (q_rank or heads) * self.head_dim, bias=False)  # without a rank: the queries
        self.key_a = Linear(dim, k_rank * heads, bias=False)
        self.key_b = Linear(dim, k_rank * self.head_dim, bias=False)
        self.value_a = Linear(dim, v_rank * heads, bias=False)
        self.value_b = Linear(dim, v_rank * self.head_dim, bias=False)
        self.out = output_projection(heads * self.head_dim, dim)
        self.together = ("query_a",) * bool(q_rank) + ("query_b", "key_a", "key_b", "value_a", "value_b")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        *query_a, query_b, key_a, key_b, value_a, value_b = project(x, *(getattr(self, name) for name in self.together))
        q = self.rotate(query_b.unflatten(-1, (-1, self.head_dim)), context)  # (B, T, R or H, D)
        if query_a:
            q = self.product(query_a[0], q)
        key_b = self.rotate(key_b.unflatten(-1, (-1, self.head_dim)), context).flatten(2)
        rows, state = torch.cat([key_a, key_b, value_a, value_b], -1), context.state  # (B, T, (R_K + R_V)(H + D))
        if state is not None and state.length > 0:
            y = self.by_factors(q, state.append(rows).to(q.dtype), context)
        else:
            k, v = (self.product(a, b.unflatten(-1, (-1, self.head_dim))) for a, b in ((key_a, key_b), (value_a, value_b)))
            y = self.attend(*(u.transpose(1, 2) for u in (q, k, v)), context).transpose(1, 2)
            if state is not None:
                state.append(rows)
        return self.out(y.flatten(2))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a (B, T, R H) and b (B, T, R, D) -> (B, T, H, D)."""
        rank = b.shape[2]
        return torch.einsum("btrh,btrd->bthd", a.unflatten(-1, (rank, self.heads)), b) / rank

    def by_factors(self, q: Tensor, rows: Tensor, context: Context) -> Tensor:
        """(B, T, H, D) of queries (B, T, H, D) and the factors of all tokens (B, S, (R_K + R_V)(H + D))."""
        sizes = [rank * width for rank in (self.k_rank, self.v_rank) for width in (self.heads, self.head_dim)]
        key_a, key_b, value_a, value_b = (  # each with the rank in front: (R, B, S, H or D)
            u.unflatten(-1, (rank, -1)).movedim(2, 0)
            for u, rank in zip(rows.split(sizes, -1), (self.k_rank, self.k_rank, self.v_rank, self.v_rank), strict=True)
        )
        (B, T, H, D), S = q.shape, rows.shape[1]
        exact = torch.promote_types(q.dtype, torch.float32)
        q, scores = q.transpose(1, 2).flatten(1, 2), 0  # (B, H T, D)
        for a, b in zip(key_a, key_b, strict=True):
            scores = scores + a.mT[:, :, None] * (q @ b.mT).view(B, H, T, S).to(exact)  # a as (B, H, 1, S)
        scores = scores * (self.attend.scale / self.k_rank)
        added = self.attend.added(context, T, S)
        scores = scores if added is None else scores + added
        p = scores.masked_fill(~visible(context, T, S)[:, None], -torch.inf).softmax(-1)  # (B, H, T, S)
        y = 0
        for a, b in zip(value_a, value_b, strict=True):
            y = y + (p * a.mT[:, :, None]).to(b.dtype).flatten(1, 2) @ b  # (B, H T, D)
        return (y / self.v_rank).view(B, H, T, D).transpose(1, 2)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> RowCache:
        return RowCache(batch, max_len, self.numbers(), dtype=dtype, device=device)

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return batch * max_len * self.numbers() * dtype.itemsize

    def numbers(self) -> int:
        """How many numbers are remembered of each token."""
        return (self.k_rank + self.v_rank) * (self.heads + self.head_dim)

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of scores and weighted sum, beside those of the projections: with heads made, as in training."""
        return 4 * queries * keys * self.heads * self.head_dim
