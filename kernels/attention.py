"""Softmax attention that never holds the whole matrix of scores: every mask is an interval of keys for each query.

    s_ij = scale q_i . k_j                                     (with softcap c: c tanh(s_ij / c); with ALiBi: - slope |i - j|)
    p_ij = exp(s_ij) / (sum_j' exp(s_ij') + exp(sink))         over the keys j that query i sees
    y_i = sum_j p_ij v_j        lse_i = log(sum_j' exp(s_ij') + exp(sink))

Dao et al. 2022, "FlashAttention" (arXiv:2205.14135) and Dao 2023, "FlashAttention-2" (arXiv:2307.08691). What a query sees is
an interval of keys (kernels/intervals.py); the Triton path goes through it by tiles (kernels/flash.py), the PyTorch path by
blocks of queries (kernels/query_blocks.py).
ALiBi: Press et al. 2021 (arXiv:2108.12409). Softcap: Gemma Team 2024 (arXiv:2408.00118). Sinks: OpenAI 2025 (arXiv:2508.10925).
Window and global tokens: Beltagy et al. 2020 (arXiv:2004.05150). Prefix: Raffel et al. 2019 (arXiv:1910.10683).

With P visible pairs (T S without a mask, half of it when causal), D and Dv wide, b bytes a number:
    forward    2 (D + Dv) P B H FLOPs       b ((T H + S K) (D + Dv)) B + 4 T H B bytes: q, k, v read, y and lse written
    backward   (6 D + 4 Dv) P B H FLOPs     b ((2 D + 2 Dv) (T H + S K)) B bytes: q, k, v, y, dy read, dq, dk, dv written
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decode_attention import together
from kernels.flash import dense, triton_backward, triton_forward
from kernels.intervals import spans, visible
from kernels.launch import Function, apply, on_triton
from kernels.query_blocks import torch_backward, torch_forward
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

# B batch, H query heads, K key/value heads, G = H / K, T queries, S keys, D head dim, Dv that of the values


def probabilities(
    q, k, causal=True, window=None, global_tokens=0, documents=None, prefix=None, key_lengths=None, alibi=None, softcap=0.0,
    sinks=None, scale=None,
):  # fmt: skip
    """p and d capped / d raw score (B, H, T, S), lse (B, H, T)."""
    (_, H, T, D), S = q.shape, k.shape[2]
    i, j = np.arange(S - T, S)[:, None], np.arange(S)
    s = q @ np.repeat(k, H // k.shape[1], 1).swapaxes(2, 3) * (D**-0.5 if scale is None else scale)
    slope = np.ones_like(s)
    if softcap:
        s = softcap * np.tanh(s / softcap)
        slope = 1 - (s / softcap) ** 2
    if alibi is not None:
        s = s - alibi[:, None, None] * abs(i - j)
    seen = visible(i, j, causal, window, global_tokens, documents, prefix, key_lengths)
    s = np.where(seen[:, None], s, -np.inf)
    sink = np.full((H, 1), -np.inf) if sinks is None else sinks[:, None]
    highest = np.maximum(s.max(-1, initial=-np.inf), sink)
    highest = np.where(np.isinf(highest), 0, highest)
    with np.errstate(divide="ignore"):
        lse = highest + np.log(np.exp(s - highest[..., None]).sum(-1) + np.exp(sink - highest))
    return np.exp(s - np.where(np.isinf(lse), 0, lse)[..., None]), slope, lse


def reference(q, k, v, *, with_lse=False, **options):
    p, _, lse = probabilities(q, k, **options)
    y = p @ np.repeat(v, q.shape[1] // v.shape[1], 1)
    return (y, lse) if with_lse else y


def reference_backward(grads, q, k, v, *, with_lse=False, scale=None, sinks=None, **options):
    p, slope, lse = probabilities(q, k, scale=scale, sinks=sinks, **options)
    (B, H, _, D), K = q.shape, k.shape[1]
    dp = grads[0] @ np.repeat(v, H // K, 1).swapaxes(2, 3)
    delta = (p * dp).sum(-1) - (grads[1] if with_lse else 0)  # lse depends on s_ij as y does: through p_ij
    ds = p * (dp - delta[..., None]) * slope * (D**-0.5 if scale is None else scale)
    found = dict(
        q=ds @ np.repeat(k, H // K, 1),
        k=(ds.swapaxes(2, 3) @ q).reshape(B, K, H // K, *k.shape[2:]).sum(2),
        v=(p.swapaxes(2, 3) @ grads[0]).reshape(B, K, H // K, *v.shape[2:]).sum(2),
    )
    if sinks is not None:
        found["sinks"] = -(np.exp(sinks[:, None] - lse) * delta).sum((0, 2))
    return found


class Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, slopes, low, high, options: tuple, with_lse: bool):
        ctx.set_materialize_grads(False)
        if on_triton(q):
            q, k, v = map(dense, (q, k, v))
            y, base, shares = triton_forward(q, k, v, sinks, slopes, low, high, *options)
            kept, lse = (), torch.where(base == torch.inf, -torch.inf, base * math.log(2)) if with_lse else None
        else:
            base = None
            y, lse, shares, kept = torch_forward(q, k, v, sinks, slopes, low, high, *options, with_lse or sinks is not None)
        ctx.save_for_backward(
            q, k, v, sinks, slopes, low, high, y if on_triton(q) or sinks is not None else None, base, shares, *kept
        )
        ctx.options = options
        return (y, lse) if with_lse else y

    @staticmethod
    def backward(ctx, dy: Tensor | None, dlse: Tensor | None = None):
        q, k, v, sinks, slopes, low, high, y, base, shares, *kept = ctx.saved_tensors
        if dy is None:
            dy = q.new_zeros(*q.shape[:3], v.shape[-1])
        if on_triton(q):
            dlse = None if dlse is None else dlse.contiguous()
            dq, dk, dv, delta = triton_backward(q, k, v, slopes, low, high, y, base, dense(dy), dlse, *ctx.options)
        else:
            dq, dk, dv = torch_backward(q, k, v, sinks, slopes, low, high, kept, dy, dlse, *ctx.options)
            if sinks is not None:
                delta = torch.linalg.vecdot(dy.to(shares.dtype), y.to(shares.dtype)) - (0 if dlse is None else dlse)
        dsinks = None
        if sinks is not None:
            dsinks = -(shares * delta).sum((0, 2)).to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None, None, None, None


def merge(y1: Tensor, lse1: Tensor, y2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from attention over each: y (…, T, Dv), lse (…, T). A sink joins one of them."""
    highest = torch.maximum(lse1, lse2).detach()
    highest = torch.where(highest == -torch.inf, 0, highest)
    first, second = torch.exp(lse1 - highest), torch.exp(lse2 - highest)
    seen = first + second > 0
    total = torch.where(seen, first + second, 1)
    y = (first / total)[..., None] * y1 + (second / total)[..., None] * y2
    return y.to(y1.dtype), torch.where(seen, highest + total.log(), -torch.inf)


def fused_is_faster(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> bool:
    """Whether PyTorch's kernel for CPUs serves a call without extras: it wins in float32, and in half precision by length."""
    if q.device.type not in ("cpu", "meta") or window is not None or q.numel() == 0 or v.numel() == 0:
        return False
    fits = (q.shape[2] == k.shape[2] or not causal) and q.shape[-1] == v.shape[-1]
    return fits and (q.element_size() >= 4 or q.shape[2] > 2048)


def fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """PyTorch's kernel for CPUs: what scaled_dot_product_attention takes there, but in the dtype of q under autocast too."""
    q, k, v = map(dense, (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)[0]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, global_tokens: int = 0,
    documents: Tensor | None = None, prefix: Tensor | None = None, key_lengths: Tensor | None = None,
    alibi: Tensor | None = None, softcap: float = 0.0, sinks: Tensor | None = None, scale: float | None = None,
    with_lse: bool = False, shared_spans: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, H, T, Dv) of q (B, H, T, D), k (B, K, S, D), v (B, K, S, Dv), all of one dtype; `with_lse` adds lse (B, H, T).

    Query head h reads key head h // (H / K). The T queries are the last T of the S tokens: query t stands at S - T + t.
    lse is float32 (float64 for float64) and differentiable. A row that sees nothing gives y = 0, lse = -inf (or its sink).

    causal          a token sees itself and what stands before it
    window          and only what is less than this many tokens away
    global_tokens   but the first n tokens see and are seen beyond the window
    documents       (B, S) integers: a token sees only its own run of equal numbers
    prefix          (B,) integers: the first n keys of a row are seen by all its queries, also by earlier ones (causal only)
    key_lengths     (B,) integers: the keys that are there; the rest is padding
    alibi           (H,) float: slope |i - j| is taken off each score (no gradient)
    softcap         c > 0: scores become c tanh(score / c), before ALiBi
    sinks           (H,) float: a logit that takes part in the sum of each row's softmax and has no value
    scale           of q . k; by default 1 / sqrt(D)
    shared_spans    what `spans` gave for this causal, documents, prefix and key_lengths, instead of the last three

    ValueError for an argument that does not fit.
    """
    bounded = documents is not None or prefix is not None or key_lengths is not None or shared_spans is not None
    plain = not (bounded or softcap or with_lse or global_tokens) and alibi is None and sinks is None
    check_shapes(q, k, v, causal)
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    require(window is None or window > 0, "window", f"at least 1, not {window}")
    require(scale is None or scale > 0, "scale", f"more than 0, not {scale}")
    if plain and not on_triton(q) and fused_is_faster(q, k, v, causal and T > 1, window):
        return fused(q, k, v, causal and T > 1, scale)
    if plain and T == 1 and S > 0 and not on_triton(q):  # a step of decoding, with as little to do per call as can be
        if q.element_size() == 2 and not q.is_cuda:
            return together(q, k, v, S, window, 0.0, None, D**-0.5 if scale is None else scale)
        if window is not None:
            k, v = k[:, :, -window:], v[:, :, -window:]
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=H != K)
    require(global_tokens >= 0, "global_tokens", f"at least 0, not {global_tokens}")
    require(softcap >= 0, "softcap", f"at least 0, not {softcap}")
    placed = window is not None or documents is not None or alibi is not None
    require(T <= S or not placed, "q", f"{T} queries cannot be the last of {S} tokens")
    require(prefix is None or causal, "prefix", "of use with causal=True only")
    for name, x, shape in (("documents", documents, (B, S)), ("prefix", prefix, (B,)), ("key_lengths", key_lengths, (B,))):
        fits = x is None or (x.shape == shape and not x.is_floating_point())
        require(fits, name, f"integers {shape}, not {None if x is None else (x.dtype, tuple(x.shape))}")
    for name, x in (("alibi", alibi), ("sinks", sinks)):
        fits = x is None or (x.shape == (H,) and x.is_floating_point())
        require(fits, name, f"a number for each of {H} heads, not {None if x is None else (x.dtype, tuple(x.shape))}")
    low = high = None
    if shared_spans is not None:
        low, high = shared_spans
        fits = low.shape == high.shape == (B, T) and low.dtype == high.dtype == torch.int32
        require(fits, "shared_spans", f"two int32 tensors ({B}, {T}), not {low.dtype} {tuple(low.shape)}, {tuple(high.shape)}")
        require(documents is prefix is key_lengths is None, "shared_spans", "instead of documents, prefix, key_lengths")
    elif bounded:
        low, high = spans(B, T, S, causal=causal, documents=documents, prefix=prefix, key_lengths=key_lengths)
    scale = D**-0.5 if scale is None else scale
    cap = float(softcap) if softcap else None
    slopes = None if alibi is None else alibi.detach().contiguous()
    first_tokens = global_tokens if global_tokens and window is not None else None
    options = (causal, window, first_tokens, scale, cap)
    return apply(Attention, q, k, v, sinks if sinks is None else sinks.contiguous(), slopes, low, high, options, with_lse)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """ValueError unless these are queries, keys and values that fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"{name}: floating point of four axes, and the dtype of q, not {x.dtype} {tuple(x.shape)}")
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    if not 1 <= D <= 256:
        raise ValueError(f"q: head dims of 1 to 256, not {D}")
    if K == 0 or H % K or k.shape != (B, K, S, D):
        raise ValueError(f"k: (B, K, S, D) with K dividing H, for q {tuple(q.shape)}, not {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3] or not 1 <= v.shape[3] <= 256:
        raise ValueError(f"v: (B, K, S, Dv) with Dv of 1 to 256, for k {tuple(k.shape)}, not {tuple(v.shape)}")
    if causal and T > S:
        raise ValueError(f"q: {T} queries cannot be the last of {S} tokens")


def pytorch(
    q, k, v, *, causal=True, window=None, global_tokens=0, documents=None, prefix=None, key_lengths=None, alibi=None,
    softcap=0.0, sinks=None, scale=None, with_lse=False,
):  # fmt: skip
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    seen = None
    if not causal or window is not None or documents is not None or prefix is not None or key_lengths is not None or T < S:
        i, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
        seen = visible(i, j, causal, window, global_tokens, documents, prefix, key_lengths)[:, None]
    if alibi is None and not softcap and sinks is None and not with_lse:
        return F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale, enable_gqa=H != K)
    i, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
    s = (q @ k.repeat_interleave(H // K, 1).mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if alibi is None else s - alibi[:, None, None] * (i - j).abs()
    s = s.masked_fill(~(j <= i) if seen is None else ~seen, -torch.inf)
    sink = s.new_full((H,), -torch.inf) if sinks is None else sinks.to(s.dtype)
    s = torch.cat([s, sink[:, None, None].expand(B, H, T, 1)], -1)
    y = s.softmax(-1)[..., :-1].to(v.dtype) @ v.repeat_interleave(H // K, 1)
    return (y, s.logsumexp(-1)) if with_lse else y


def inputs(draw: Draw) -> dict:
    B, K, G, D = draw.one_of(1, 2, 0), draw.one_of(1, 2), draw.one_of(1, 3), draw.one_of(16, 5, 33)
    S = draw.one_of(7, 0, 3, 33, 49, 70)
    T, causal = draw.one_of(S, S, min(S, 1), S // 2), draw.flag()
    if not causal and draw.flag():
        T = draw.one_of(3, 40)
    placed = T <= S
    windowed = placed and draw.flag()
    i, j = np.arange(S - T, S)[:, None], np.arange(S)
    sizes = draw.integers(8, low=1, high=40)
    case = dict(
        causal=causal,
        window=draw.one_of(1, 5, 20) if windowed else None,
        global_tokens=draw.one_of(0, 2, 18) if windowed else 0,
        documents=np.stack([np.repeat(draw.random.permutation(8), sizes)[:S] for _ in range(B)] or [np.zeros(S, int)])[:B]
        if placed and sizes.sum() >= S and draw.flag()
        else None,
        prefix=draw.integers(B, high=S) if causal and draw.flag() else None,
        key_lengths=draw.integers(B, high=S) if draw.flag() else None,
    )
    seen = visible(i, j, **case).sum(-1)  # of none, only a sink makes lse a number; of one, only a sink makes p depend on q
    return dict(
        q=draw.normal(B, K * G, T, D),
        k=draw.normal(B, K, S, D),
        v=draw.normal(B, K, S, draw.one_of(D, 16, 40)),
        alibi=draw.uniform(K * G, high=0.5) if placed and draw.flag() else None,
        softcap=draw.one_of(0.0, 2.0),
        sinks=draw.normal(K * G) if B and (seen.min(initial=S) == 0 or seen.max(initial=0) <= 1 or draw.flag()) else None,
        scale=draw.one_of(None, 0.3),
        with_lse=draw.flag(),
        **case,
    )


def cost(q, k, v, *, causal=True, window=None, **_) -> tuple[Cost, Cost]:
    (B, H, T, D), (S, DV) = q.shape, v.shape[2:]
    i, j = np.arange(S - T, S), S if window is None else window
    seen = np.minimum(i + 1, j) if causal else np.minimum(i + j, S) - np.maximum(i - j + 1, 0)  # by documents: less
    pairs, small, large = int(seen.sum()) * B * H, 4 * B * H * T, bytes_of(q, k, v)
    y = B * H * T * DV * q.element_size()
    return Cost(2 * (D + DV) * pairs, large + y + small), Cost((6 * D + 4 * DV) * pairs, 2 * (large + y) + small)


def wide(heads: int, width: int) -> Shape:
    """Heads wider than 128, in bfloat16 whatever the example's dtype."""
    return Shape((2, heads, 4096, width), torch.bfloat16)


SPEC = Spec(
    op=attention,
    reference=reference,
    reference_backward=reference_backward,
    pytorch=pytorch,
    inputs=inputs,
    gradients=("q", "k", "v", "sinks"),
    cost=cost,
    gpu=(
        dict(q=Shape((4, 16, 8192, 128)), k=Shape((4, 16, 8192, 128)), v=Shape((4, 16, 8192, 128))),
        dict(
            q=Shape((4, 32, 4096, 64)), k=Shape((4, 8, 4096, 64)), v=Shape((4, 8, 4096, 64)), window=1024, softcap=50.0,
            documents=Shape((4, 4096), below=8), sinks=Shape((32,)), alibi=Shape((32,)),
        ),
        dict(q=wide(8, 256), k=wide(4, 256), v=wide(4, 256), window=1024, softcap=50.0),  # Gemma 2
        dict(q=wide(16, 192), k=wide(16, 192), v=wide(16, 128)),  # DeepSeek-V3's heads
    ),
    cpu=(
        dict(q=Shape((16, 4, 256, 64)), k=Shape((16, 4, 256, 64)), v=Shape((16, 4, 256, 64))),
        dict(q=Shape((4, 8, 1024, 64)), k=Shape((4, 2, 1024, 64)), v=Shape((4, 2, 1024, 64))),
    ),
)  # fmt: skip
