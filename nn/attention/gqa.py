import math
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.attention import attention, merge
from kernels.rmsnorm import rms_norm
from nn.attention.cache import KVCache, WindowCache
from nn.attention.documents import document_spans
from nn.attention.visible import visible
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.position.none import NoPosition
from nn.position.rope import RoPE

# B batch, T time, S keys (earlier ones and this call's), C model dim, H query heads, K key/value heads, D head dim


class GQA(nn.Module):
    """Grouped-query attention: H query heads share K pairs of key and value heads, H/K queries each.

    Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"
    (arXiv:2305.13245). K = H is multi-head attention, K = 1 multi-query attention. Its options are those that stand beside
    it in published models:

    qk_norm           queries and keys of unit root mean square (Henry et al. 2020, arXiv:2010.04245): `unit` without a
                      gain, `head` with one that the heads share (Qwen3), `all` over all heads together (OLMo 2)
    window            a token sees itself and the window - 1 before it (Mistral 7B, arXiv:2310.06825) …
    global_tokens     … and the first n tokens of all (Beltagy et al. 2020, "Longformer", arXiv:2004.05150)
    theta             a base of this layer's own for rotary positions, which their `factor` does not stretch: local layers
                      turn faster than global ones in Gemma 3 (arXiv:2503.19786) and ModernBERT (arXiv:2412.13663)
    softcap           scores are squashed into this bound by tanh (Gemma 2, arXiv:2408.00118)
    scale             of the scores, instead of 1 / sqrt(D)
    temperature       scores are divided by it: below 1, at inference, long texts keep their differences ("TempScale" of
                      Zhou et al. 2024, "Length-Induced Embedding Collapse", arXiv:2410.24200)
    sinks             a learned logit a head that takes part in each softmax and has no value (gpt-oss, arXiv:2508.10925)
    gate              each output number is multiplied by sigmoid(x W) (Qiu et al. 2025, arXiv:2505.06708)
    value_embedding   adds a learned vector of each token to its values (Jordan et al. 2024, "modded-nanogpt", after Zhou
                      et al. 2024, arXiv:2410.17897); it needs `vocab_size`

    Shapes: x (B, T, C) -> (B, T, C). The decoding state holds 2 K D numbers a token, with a window those of
    global_tokens + window - 1 tokens. Scores are never stored whole, unless the position encoding is a learned bias.
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
        qk_norm: Literal["none", "unit", "head", "all"] = "none",
        qk_eps: float = 1e-6,
        window: int | None = None,
        global_tokens: int = 0,
        theta: float | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        temperature: float = 1.0,
        sinks: bool = False,
        gate: bool = False,
        value_embedding: bool = False,
    ):
        super().__init__()
        at_least(1, heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=window)
        at_least(0, qk_eps=qk_eps, global_tokens=global_tokens, softcap=softcap)
        for name, value in (("scale", scale), ("temperature", temperature)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: {value} is not a finite number above 0")
        kv_heads = kv_heads or heads
        if heads % kv_heads:
            raise ValueError(f"kv_heads: {heads} query heads cannot be shared among {kv_heads} key/value heads evenly")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width_of_heads(dim, heads, head_dim)
        self.window, self.global_tokens, self.softcap = window, global_tokens, softcap
        self.scale = (self.head_dim**-0.5 if scale is None else scale) / temperature
        position, self.theta = position or NoPosition(), theta
        if theta is not None:
            if not isinstance(position, RoPE):
                raise ValueError(f"theta: a rotary base needs the position encoding rope, not {type(position).__name__}")
            position = position.with_base(theta)
        # functions alone: the encoding's parameters are the model's
        self.rotate, self.bias, self.slopes = position.rotate, position.bias, position.slopes(heads)
        # a window's cache drops tokens; first ones and a bias by distance need to know how many
        biased = position.bias.__func__ is not NoPosition.bias or self.slopes is not None
        self.forgets = window is not None and not (global_tokens and biased)
        inner, shared = heads * self.head_dim, kv_heads * self.head_dim
        self.query = Linear(dim, inner, bias=bias)
        self.key = Linear(dim, shared, bias=bias)
        self.value = Linear(dim, shared, bias=bias)
        self.qk_norm, self.qk_eps = qk_norm, qk_eps
        widths = {"head": (self.head_dim, self.head_dim), "all": (inner, shared)}.get(qk_norm)
        self.query_gain, self.key_gain = (nn.Parameter(torch.ones(n)) for n in widths) if widths else (None, None)
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None
        self.gate = Linear(dim, inner, bias=bias) if gate else None
        self.value_table = None
        if value_embedding:
            if vocab_size is None:
                raise ValueError("vocab_size: value_embedding needs it")
            self.value_table = nn.Embedding(vocab_size, shared)
        self.out = output_projection(inner, dim, bias=bias if out_bias is None else out_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.projected(x, context)
        q, k = self.rotate(q, context), self.rotate(k, context)
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))  # (B, heads, T, D)
        if context.state is not None:
            k, v = (u.to(q.dtype) for u in context.state.append(k, v))  # (B, K, S, D); under autocast they may differ
        y = self.attend(q, k, v, context).transpose(1, 2).flatten(2)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.out(y)

    def projected(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, T, heads, D), normalised and not yet turned."""
        q, k, v = project(x, self.query, self.key, self.value)
        if self.qk_norm == "all":
            q, k = rms_norm(q, self.query_gain, eps=self.qk_eps), rms_norm(k, self.key_gain, eps=self.qk_eps)
        q, k, v = map(self.heads_of, (q, k, v))
        if self.value_table is not None:
            v = v + self.heads_of(self.value_table(context.tokens)).to(v.dtype)
        if self.qk_norm in ("unit", "head"):
            q, k = rms_norm(q, self.query_gain, eps=self.qk_eps), rms_norm(k, self.key_gain, eps=self.qk_eps)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """(B, H, T, D) of queries (B, H, T, D), keys and values (B, K, S, D): softmax attention as the options say."""
        bias = self.bias(context, self.heads, q.shape[2], k.shape[2])
        if bias is not None:
            return self.attend_with(bias, q, k, v, context)
        options = dict(softcap=self.softcap, sinks=self.sinks, scale=self.scale)
        options["alibi"] = None if self.slopes is None else self.slopes.to(q.device)
        spans, first = document_spans(context), self.global_tokens if self.window is not None else 0
        if spans is None or not first:
            options |= dict(causal=context.causal, window=self.window, global_tokens=first, shared_spans=spans)
            return attention(q, k, v, **options)
        if not context.causal:
            raise ValueError("documents: global_tokens of an encoder are the first of a row; give each document its own")
        # packed: the window of each document, and its first tokens where the window no longer reaches them
        low, high = spans
        far = low, torch.minimum(low + first, high - self.window).maximum(low).contiguous()
        near = attention(q, k, v, window=self.window, shared_spans=spans, with_lse=True, **options)
        options["sinks"] = None  # it takes part once
        y, _ = merge(*near, *attention(q, k, v, causal=False, shared_spans=far, with_lse=True, **options))
        return y

    def attend_with(self, bias: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """The same with a bias (B or 1, H, T, S) beside the scores, which are then held whole."""
        T, S, first = q.shape[2], k.shape[2], self.global_tokens
        seen = visible(context, T, S)[:, None]
        if self.window is not None:
            at = torch.arange(S, device=q.device)
            near = (at[S - T :, None] - at).abs() < self.window
            early = (at if context.documents is None else context.positions).view(-1, 1, S) < first  # (B or 1, 1, S)
            seen = seen & (near | early | early.mT[:, S - T :])[:, None]
        k, v = (u.repeat_interleave(self.heads // self.kv_heads, 1) for u in (k, v))
        scores = self.scale * (q @ k.mT)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = (scores + bias).masked_fill(~seen, -torch.inf)
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
        return scores.softmax(-1)[..., :S].to(v.dtype) @ v

    def is_plain(self) -> bool:
        """Whether it is as its paper has it, none of the options that stand beside it being used."""
        parts = (self.window, self.sinks, self.gate, self.value_table)
        return self.qk_norm == "none" and not self.softcap and all(part is None for part in parts)

    def heads_of(self, x: Tensor) -> Tensor:
        """(B, T, heads D) -> (B, T, heads, D)."""
        return x.view(x.shape[0], x.shape[1], x.shape[2] // self.head_dim, self.head_dim)

    def init_state(
        self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> KVCache | WindowCache:
        sizes, options = (batch, self.kv_heads, max_len, self.head_dim), dict(dtype=dtype, device=device)
        if not self.forgets:
            return KVCache(*sizes, **options)
        return WindowCache(*sizes, first=self.global_tokens, last=self.window - 1, **options)

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        kept = min(max_len, self.global_tokens + self.window - 1) if self.forgets else max_len
        return 2 * batch * self.kv_heads * kept * self.head_dim * dtype.itemsize

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of scores and weighted sum for `queries` x `keys` pairs, beside those of the projections."""
        seen = keys if self.window is None else min(keys, self.global_tokens + self.window)
        return 4 * queries * seen * self.heads * self.head_dim


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
        qk_norm: Literal["none", "unit", "head", "all"] = "none",
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
        qk_norm: Literal["none", "unit", "head", "all"] = "none",
    ):
        super().__init__(dim, position, heads=heads, kv_heads=1, head_dim=head_dim, bias=bias, qk_norm=qk_norm)
