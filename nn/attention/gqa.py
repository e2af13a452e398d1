import torch
from torch import Tensor, nn

from kernels.attention import attention
from kernels.rmsnorm import rms_norm
from nn.attention.cache import KVCache
from nn.attention.documents import document_spans
from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.position.none import NoPosition

# B batch, T time, S keys (earlier ones and this call's), C model dim, H query heads, K key/value heads, D head dim


class GQA(nn.Module):
    """Grouped-query attention: H query heads share K pairs of key and value heads, H/K queries each.

    Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"
    (arXiv:2305.13245). K = H is multi-head attention, K = 1 multi-query attention. `qk_norm` normalises each query and
    key to unit root mean square, without a gain (Henry et al. 2020, arXiv:2010.04245). `value_embedding` adds a learned
    vector of each token to its values, beside what they take from x (Jordan et al. 2024, "modded-nanogpt", after the
    value residuals of Zhou et al. 2024, arXiv:2410.17897); it needs `vocab_size`.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is a KVCache of 2 K D numbers a token.
    """

    together = ("query", "key", "value")

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
        qk_norm: bool = False,
        value_embedding: bool = False,
    ):
        super().__init__()
        at_least(1, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        kv_heads = kv_heads or heads
        if heads % kv_heads:
            raise ValueError(f"kv_heads: {heads} query heads cannot be shared among {kv_heads} key/value heads evenly")
        if head_dim is None and dim % heads:
            raise ValueError(f"heads: a dim of {dim} does not divide into {heads} heads; give head_dim or another number")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim or dim // heads
        self.qk_norm = qk_norm
        self.rotate = (position or NoPosition()).rotate  # the function alone: the encoding's parameters are the model's
        self.query = Linear(dim, heads * self.head_dim, bias=bias)
        self.key = Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.value = Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.value_table = None
        if value_embedding:
            if vocab_size is None:
                raise ValueError("vocab_size: value_embedding needs it")
            self.value_table = nn.Embedding(vocab_size, kv_heads * self.head_dim)
        self.out = output_projection(heads * self.head_dim, dim, bias=bias if out_bias is None else out_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = map(self.heads_of, project(x, self.query, self.key, self.value))  # (B, T, heads, D)
        if self.value_table is not None:
            v = v + self.heads_of(self.value_table(context.tokens)).to(v.dtype)
        q, k = self.rotate(q, context), self.rotate(k, context)
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))  # (B, heads, T, D)
        if context.state is not None:
            k, v = (u.to(q.dtype) for u in context.state.append(k, v))  # (B, K, S, D); under autocast they may differ
        y = attention(q, k, v, causal=context.causal, shared_spans=document_spans(context))
        return self.out(y.transpose(1, 2).flatten(2))

    def heads_of(self, x: Tensor) -> Tensor:
        """(B, T, heads D) -> (B, T, heads, D)."""
        return x.view(x.shape[0], x.shape[1], x.shape[2] // self.head_dim, self.head_dim)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> KVCache:
        return KVCache(batch, self.kv_heads, max_len, self.head_dim, dtype=dtype, device=device)

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return 2 * batch * self.kv_heads * max_len * self.head_dim * dtype.itemsize

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of scores and weighted sum for `queries` x `keys` pairs, beside those of the projections."""
        return 4 * queries * keys * self.heads * self.head_dim


class MHA(GQA):
    """Multi-head attention: every query head has its own keys and values.

    Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762), section 3.2.
    """

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
    ):
        super().__init__(dim, position, heads=heads, head_dim=head_dim, bias=bias, qk_norm=qk_norm)


class MQA(GQA):
    """Multi-query attention: all query heads share one head of keys and values.

    Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need" (arXiv:1911.02150).
    """

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
    ):
        super().__init__(dim, position, heads=heads, kv_heads=1, head_dim=head_dim, bias=bias, qk_norm=qk_norm)
