import torch
from torch import Tensor, nn

from nn.attention.attend import Attend
from nn.attention.row_cache import RowCache
from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.norm.rmsnorm import RMSNorm
from nn.position.none import NoPosition

# B batch, T time, S keys (earlier ones and this call's), C model dim, H heads
# R kv_rank, N nope_dim, P rope_dim, V value_dim


class MLA(nn.Module):
    """Multi-head latent attention: the keys and values of all heads are made from one short vector a token.

    DeepSeek-AI 2024, "DeepSeek-V2" (arXiv:2405.04434), section 2.1, eq. 37 to 47:

        c_t = norm(W_down x_t)                  R numbers: the latent
        k_t = [W_uk c_t ; rotate(W_kr x_t)]     N numbers a head, and P that all heads share and the position turns
        v_t = W_uv c_t                          V numbers a head
        q_t = [W_q x_t ; rotate(W_qr x_t)]      or, with q_rank, from a normed latent of its own

    and scores are q . k / sqrt(N + P). Only c_t and the turned shared key are remembered. A step of decoding never makes
    heads of them: it takes W_uk into the query and W_uv out of the sum, so that all heads read one key [c ; shared] and
    one value c ("absorbed"); the first call of a state, as training, makes the heads, which takes fewer FLOPs there.

    Defaults follow the paper's shares: R = 4 head_dim, N = V = head_dim, P = head_dim / 2 (even), head_dim = dim / heads;
    q_rank = 0 takes queries straight from x. Shapes: x (B, T, C) -> (B, T, C). The state holds R + P numbers a token.
    """

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        *,
        heads: int = 8,
        q_rank: int = 0,
        kv_rank: int | None = None,
        nope_dim: int | None = None,
        rope_dim: int | None = None,
        value_dim: int | None = None,
    ):
        super().__init__()
        at_least(1, heads=heads, kv_rank=kv_rank, nope_dim=nope_dim, rope_dim=rope_dim, value_dim=value_dim)
        at_least(0, q_rank=q_rank)
        if dim % heads and None in (kv_rank, nope_dim, rope_dim, value_dim):
            raise ValueError(f"heads: a dim of {dim} does not divide into {heads} heads; give kv_rank and every _dim")
        head_dim = max(1, dim // heads)
        self.heads, self.kv_rank = heads, kv_rank or 4 * head_dim
        self.nope_dim, self.value_dim = nope_dim or head_dim, value_dim or head_dim
        self.rope_dim = rope_dim or max(2, (head_dim // 2 + 1) // 2 * 2)
        width = self.nope_dim + self.rope_dim
        self.rotate = (position or NoPosition()).rotate  # the function alone: the encoding's parameters are the model's
        self.attend = Attend(position, heads, width**-0.5)
        self.query_down = Linear(dim, q_rank, bias=False) if q_rank else None
        self.query_norm = RMSNorm(q_rank) if q_rank else None
        self.query = Linear(q_rank or dim, heads * width, bias=False)
        self.down = Linear(dim, self.kv_rank + self.rope_dim, bias=False)
        self.norm = RMSNorm(self.kv_rank)
        self.up = Linear(self.kv_rank, heads * (self.nope_dim + self.value_dim), bias=False)
        self.out = output_projection(heads * self.value_dim, dim)
        self.together = ("query_down" if q_rank else "query", "down")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, row = project(x, self.query_down or self.query, self.down)
        if self.query_down is not None:
            q = self.query(self.query_norm(q))
        q, q_rope = q.unflatten(-1, (self.heads, -1)).split([self.nope_dim, self.rope_dim], -1)  # (B, T, H, N), (B, T, H, P)
        q_rope = self.rotate(q_rope, context)
        latent, shared = row.split([self.kv_rank, self.rope_dim], -1)  # (B, T, R), (B, T, P)
        shared = self.rotate(shared[:, :, None], context)[:, :, 0]
        row = torch.cat([self.norm(latent), shared], -1)  # (B, T, R + P)
        state = context.state
        if state is not None and state.length > 0:
            y = self.absorbed(q, q_rope, state.append(row).to(row.dtype), context)
        else:
            y = self.materialised(q, q_rope, row, context)
            if state is not None:
                state.append(row)
        return self.out(y.flatten(2))

    def materialised(self, q: Tensor, q_rope: Tensor, row: Tensor, context: Context) -> Tensor:
        """(B, T, H, V), with keys and values made for each head."""
        latent, shared = row.split([self.kv_rank, self.rope_dim], -1)
        k, v = self.up(latent).unflatten(-1, (self.heads, -1)).split([self.nope_dim, self.value_dim], -1)  # (B, S, H, ·)
        k = torch.cat([k, shared[:, :, None].expand(-1, -1, self.heads, -1)], -1)  # (B, S, H, N + P)
        q = torch.cat([q, q_rope], -1)
        return self.attend(*(u.transpose(1, 2) for u in (q, k, v)), context).transpose(1, 2)

    def absorbed(self, q: Tensor, q_rope: Tensor, row: Tensor, context: Context) -> Tensor:
        """The same, all heads attending to the rows (B, S, R + P) as they are remembered."""
        ups = self.up.effective_weight.view(self.heads, self.nope_dim + self.value_dim, self.kv_rank)
        key_up, value_up = ups.split([self.nope_dim, self.value_dim], 1)  # (H, N, R), (H, V, R)
        q = torch.cat([torch.einsum("bthn,hnr->bthr", q, key_up), q_rope], -1)  # (B, T, H, R + P)
        row = row[:, None]  # (B, 1, S, R + P)
        y = self.attend(q.transpose(1, 2), row, row[..., : self.kv_rank], context)  # (B, H, T, R)
        return torch.einsum("bhtr,hvr->bthv", y, value_up)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> RowCache:
        return RowCache(batch, max_len, self.kv_rank + self.rope_dim, dtype=dtype, device=device)

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return batch * max_len * (self.kv_rank + self.rope_dim) * dtype.itemsize

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of scores and weighted sum, beside those of the projections: with heads made, as in training."""
        return 2 * queries * keys * self.heads * (self.nope_dim + self.rope_dim + self.value_dim)
