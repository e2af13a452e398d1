"""Attention of a few new queries against a long cache of keys and values, each row of the batch filled to its own length.

    y_t = sum_j softmax_j(scale q_t . k_j) v_j        over the keys j up to t's own place, length - T + t

A step of decoding reads the whole cache and does little with it, so what counts is how many programs read at once: each
row's keys are split among programs, whose results merge by their log-sum-exp in a second kernel (Dao et al. 2023,
"Flash-Decoding", pytorch.org/blog/flash-decoding; the merging is that of Dao et al. 2022, arXiv:2205.14135). The G query
heads that share a key head (Shazeer 2019, arXiv:1911.02150; Ainslie et al. 2023, arXiv:2305.13245) are rows of one tile.

With L = the sum of the lengths (of the windows, if shorter) and b bytes a number:
    2 G K T L (D + Dv) FLOPs        b K L (D + Dv) bytes: the filled part of the cache is read, once
There is no backward pass.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import dot, launch, narrow, on_triton, power_of_2, programs, tanh, tl, triton
from kernels.spec import Cost, Draw, Shape, Spec, require

LOG2E = tl.constexpr(1.4426950408889634)
CACHED = 2**18  # numbers of the cache that the PyTorch path widens at a time
SHORT = 2**16  # up to so many, PyTorch's fused kernel has less to do per call

# B batch, H query heads, K key/value heads, G = H / K, T new queries, S room for keys, D head dim, Dv that of the values


def reference(q, k, v, lengths, *, window=None, softcap=0.0, sinks=None, scale=None):
    (B, H, T, D), K = q.shape, k.shape[1]
    y = np.zeros((B, H, T, v.shape[3]))
    for b in range(B):
        for h in range(H):
            for t in range(T):
                end = lengths[b] - T + t + 1
                start = 0 if window is None else max(0, end - window)
                if end <= 0:
                    continue  # before the first key: nothing to see
                s = k[b, h // (H // K), start:end] @ q[b, h, t] * (D**-0.5 if scale is None else scale)
                s = softcap * np.tanh(s / softcap) if softcap else s
                sink = -np.inf if sinks is None else sinks[h]
                highest = max(s.max(), sink)
                p = np.exp(s - highest)
                y[b, h, t] = p @ v[b, h // (H // K), start:end] / (p.sum() + np.exp(sink - highest))
    return y


@triton.jit
def part_kernel(
    q, k, v, lengths, parts, tops, sums, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    K, G, T, S, splits, tiles, window, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """R of the G T queries of a key head against one share of its keys: exp2 sums and weighted values, in base 2."""
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits % tiles
    head = tl.program_id(0) // splits // tiles  # (batch, key head)
    b, kv = (head // K).to(tl.int64), head % K
    r = tile * R + tl.arange(0, R)  # query r is that of head r // T, the r % T-th new one
    inside = r < G * T
    h, t = kv * G + r // T, r % T
    columns, wide = tl.arange(0, BD), tl.arange(0, BV)
    at = q + b * q_b + h[:, None].to(tl.int64) * q_h + t[:, None] * q_t + columns[None, :]
    queries = tl.load(at, inside[:, None] & (columns[None, :] < D), 0)
    length = tl.minimum(tl.load(lengths + b).to(tl.int32), S)
    first = 0
    if window is not None:
        first = tl.maximum(length - T + 1 - window, 0) // N * N
    share = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), N), splits) * N
    acc = tl.zeros((R, BV), tl.float32)
    m = tl.full((R,), float("-inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    last = length - T + t  # where each query stands
    for start in tl.range(first + split * share, tl.minimum(first + (split + 1) * share, length), N):
        j = start + tl.arange(0, N)
        there = j[:, None] < length  # beyond it the cache may hold anything
        rows = j[:, None].to(tl.int64)
        keys = tl.load(k + b * k_b + kv * k_h + rows * k_t + columns[None, :], there & (columns[None, :] < D), 0)
        s = dot(queries, tl.trans(keys), tl.zeros((R, N), tl.float32)) * scale
        if softcap is not None:
            s = tanh(s / softcap) * softcap
        behind = last[:, None] - j[None, :]
        if window is not None:
            behind = tl.minimum(behind, window - 1 - behind)
        s = tl.where(behind >= 0, s * LOG2E, float("-inf"))
        highest = tl.maximum(m, tl.max(s, 1))
        finite = tl.where(highest == float("-inf"), 0, highest)
        p = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(m - finite)
        total = total * shrink + tl.sum(p, 1)
        values = tl.load(v + b * v_b + kv * v_h + rows * v_t + wide[None, :], there & (wide[None, :] < DV), 0)
        acc = dot(narrow(p, values.dtype), values, acc * shrink[:, None])
        m = highest
    row = (head.to(tl.int64) * G * T + r) * splits + split  # (batch, head, query, split)
    tl.store(tops + row, m, inside)
    tl.store(sums + row, total, inside)
    tl.store(parts + row[:, None] * DV + wide[None, :], acc, inside[:, None] & (wide[None, :] < DV))


@triton.jit
def merge_kernel(parts, tops, sums, sinks, y, H, T, splits, DV: tl.constexpr, BV: tl.constexpr, SPLITS: tl.constexpr):
    """One query a program: its shares side by side, and the sink."""
    row = tl.program_id(0).to(tl.int64)
    s, wide = tl.arange(0, SPLITS), tl.arange(0, BV)
    m = tl.load(tops + row * splits + s, s < splits, float("-inf"))
    highest = tl.max(m, 0)
    if sinks is not None:
        sink = tl.load(sinks + row // T % H).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, sink)
    finite = tl.where(highest == float("-inf"), 0, highest)
    weight = tl.exp2(m - finite)
    total = tl.sum(weight * tl.load(sums + row * splits + s, s < splits, 0), 0)
    if sinks is not None:
        total += tl.exp2(sink - finite)
    at = parts + (row * splits + s[:, None]) * DV + wide[None, :]
    values = tl.load(at, (s[:, None] < splits) & (wide[None, :] < DV), 0)
    found = tl.sum(values * weight[:, None], 0) / tl.where(total == 0, 1, total)
    tl.store(y + row * DV + wide, found, wide < DV)


def by_triton(q, k, v, lengths, window, softcap, sinks, scale) -> Tensor:
    (B, H, T, D), (_, K, S, DV) = q.shape, v.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    y = q.new_empty(B, H, T, DV)
    if S == 0:
        return y.zero_()
    on_cpu, exact = q.device.type == "cpu", q.dtype == torch.float32
    R = min(max(16, power_of_2(H // K * T)), 16 if on_cpu else 64)
    N = 16 if on_cpu or exact else 64 if max(D, DV) <= 128 else 32
    tiles = -(-(H // K * T) // R)
    wanted = programs(q.device) // (1 if on_cpu else max(1, B * K * tiles))
    splits = max(1, min(wanted, -(-S // (4 * N)), 64))  # each of some tiles, or its sum is not worth a program
    parts = q.new_empty(B, H, T, splits, DV, dtype=torch.float32)
    tops, sums = q.new_empty(2, B, H, T, splits, dtype=torch.float32)
    BD, BV = max(16, power_of_2(D)), max(16, power_of_2(DV))
    launch(
        part_kernel, (B * K * tiles * splits,), q, k, v, lengths, parts, tops, sums,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], K, H // K, T, S, splits, tiles, window, scale, softcap or None,
        D=D, DV=DV, BD=BD, BV=BV, R=R, N=N, num_warps=8 if exact else 4, num_stages=1 if exact else 2,
    )  # fmt: skip
    launch(
        merge_kernel, (B * H * T,), parts, tops, sums, sinks, y, H, T, splits,
        DV=DV, BV=BV, SPLITS=power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return y


def by_pytorch(q, k, v, lengths, window, softcap, sinks, scale) -> Tensor:
    """Rows of the batch with one length together, each on a view of the filled part of the cache."""
    S, filled = k.shape[2], lengths.tolist()
    if len(set(filled)) == 1:
        return together(q, k, v, min(filled[0], S), window, softcap, sinks, scale)
    y = q.new_empty(*q.shape[:3], v.shape[3])
    for b, length in enumerate(filled):
        part = slice(b, b + 1)
        y[part] = together(q[part], k[part], v[part], min(length, S), window, softcap, sinks, scale)
    return y


def together(q, k, v, length: int, window, softcap, sinks, scale) -> Tensor:
    """All rows filled to the same length. Half precision is widened a few rows at a time, small enough to stay in the
    processor's cache: its products of few rows are slow on a CPU, PyTorch's fused kernel on it slower still."""
    T, S = q.shape[2], k.shape[2]
    start = 0 if window is None else min(max(0, length - T + 1 - window), S)
    k, v = k[:, :, start:length], v[:, :, start:length]
    options = (start, length, window, softcap, sinks, scale)
    exact, plain = q.element_size() > 2, T == 1 <= length and not softcap and sinks is None
    if plain and (exact or k.numel() <= SHORT):
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if exact:
        return some_rows(q, k, v, *options)
    rows = max(1, CACHED // max(1, k[:1].numel()))
    parts = [some_rows(*(x[b : b + rows].float() for x in (q, k, v)), *options) for b in range(0, max(1, len(q)), rows)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(q.dtype)


def some_rows(q, k, v, start: int, length: int, window, softcap, sinks, scale) -> Tensor:
    """k and v from key `start` on."""
    (B, H, T, D), K = q.shape, k.shape[1]
    s = torch.matmul(q.reshape(B, K, H // K * T, D), k.mT).mul_(scale)
    if softcap:
        s = s.div_(softcap).tanh_().mul_(softcap)
    if T > 1 or length < 1:
        i = torch.arange(length - T, length, device=q.device)[:, None]
        j = torch.arange(start, start + k.shape[2], device=q.device)
        hidden = j > i if window is None else (j > i) | (j <= i - window)
        s.view(B, K, H // K, T, -1).masked_fill_(hidden, -torch.inf)
    p = s.softmax(-1)
    if length < T:
        p = p.nan_to_num(0)
    if sinks is not None:
        lse = s.logsumexp(-1).view(B, H, T)
        p = (p.view(B, H, T, -1) * torch.sigmoid(lse - sinks.to(p.dtype)[:, None])[..., None]).view_as(p)
    return torch.matmul(p, v).view(B, H, T, v.shape[3])


@torch.library.custom_op("rosetta::decode_attention", mutates_args=())
def traced(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int | None, softcap: float, sinks: Tensor | None, scale: float
) -> Tensor:
    """One node in a trace: the lengths decide how much there is to do."""
    return by_pytorch(q, k, v, lengths, window, softcap, sinks, scale).contiguous()


@traced.register_fake
def _(q, k, v, lengths, window, softcap, sinks, scale):
    return q.new_empty(*q.shape[:3], v.shape[3])


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, window: int | None = None, softcap: float = 0.0,
    sinks: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """y (B, H, T, Dv) of the last T tokens of each row: q (B, H, T, D), T <= 16; k (B, K, S, D), v (B, K, S, Dv), one dtype.

    lengths (B,) integers: how many keys of a row are there, the new ones included; what lies behind them is not looked at.
    Query t of row b stands at lengths[b] - T + t and sees what is there up to itself, with `window` the last so many; one
    that stands before the first key gives 0. softcap, sinks (H,) and scale as in kernels/attention.py. No gradients.
    ValueError for an argument that does not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"{name}: floating point of four axes, and the dtype of q, not {x.dtype} {tuple(x.shape)}")
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    require(1 <= D <= 256 and 1 <= T <= 16, "q", f"1 to 16 queries of 1 to 256 numbers, not {T} of {D}")
    require(K > 0 and H % K == 0 and k.shape == (B, K, S, D), "k", f"(B, K, S, D) for q {tuple(q.shape)}, not {tuple(k.shape)}")
    require(
        v.shape[:3] == k.shape[:3] and 1 <= v.shape[3] <= 256,
        "v",
        f"(B, K, S, Dv) for k {tuple(k.shape)}, not {tuple(v.shape)}",
    )
    fits = lengths.shape == (B,) and not lengths.is_floating_point()
    require(fits, "lengths", f"integers ({B},), not {lengths.dtype} {tuple(lengths.shape)}")
    require(window is None or window > 0, "window", f"at least 1, not {window}")
    require(softcap >= 0, "softcap", f"at least 0, not {softcap}")
    require(scale is None or scale > 0, "scale", f"more than 0, not {scale}")
    fits = sinks is None or (sinks.shape == (H,) and sinks.is_floating_point())
    require(
        fits, "sinks", f"a number for each of {H} heads, not {None if sinks is None else (sinks.dtype, tuple(sinks.shape))}"
    )
    scale = D**-0.5 if scale is None else scale
    sinks = None if sinks is None else sinks.contiguous()
    run = by_triton if on_triton(q) else traced if torch.compiler.is_compiling() else by_pytorch
    with torch.no_grad():
        return run(q, k, v, lengths.contiguous(), window, softcap, sinks, scale)


def pytorch(q, k, v, lengths, *, window=None, softcap=0.0, sinks=None, scale=None):
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    i = (lengths[:, None] - T + torch.arange(T, device=q.device))[:, None, :, None]
    j = torch.arange(S, device=q.device)
    seen = j <= i if window is None else (j <= i) & (j > i - window)  # (B, 1, T, S)
    if not softcap and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=H != K).nan_to_num(0)
    s = (q @ k.repeat_interleave(H // K, 1).mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    sink = s.new_full((H,), -torch.inf) if sinks is None else sinks.to(s.dtype)
    s = torch.cat([s.masked_fill(~seen, -torch.inf), sink[:, None, None].expand(B, H, T, 1)], -1)
    return s.softmax(-1).nan_to_num(0)[..., :-1].to(v.dtype) @ v.repeat_interleave(H // K, 1)


def inputs(draw: Draw) -> dict:
    B, K, G, D = draw.one_of(2, 1, 3, 0), draw.one_of(1, 2), draw.one_of(1, 3, 4), draw.one_of(16, 5, 33)
    S, T = draw.one_of(70, 100, 5, 0), draw.one_of(1, 1, 3, 16)
    return dict(
        q=draw.normal(B, K * G, T, D),
        k=draw.normal(B, K, S, D),
        v=draw.normal(B, K, S, draw.one_of(D, 16, 40)),
        lengths=np.full(B, S) if draw.flag() else draw.integers(B, high=S),
        window=draw.one_of(None, None, 1, 20),
        softcap=draw.one_of(0.0, 2.0),
        sinks=draw.normal(K * G) if draw.flag() else None,
        scale=draw.one_of(None, 0.3),
    )


def cost(q, k, v, lengths, *, window=None, **_) -> tuple[Cost, Cost]:
    (B, H, T, D), (_, K, S, DV) = q.shape, v.shape
    keys = B * S if lengths.is_meta else int(lengths.sum())
    keys = keys if window is None else min(keys, B * (window + T - 1))
    return Cost(2 * H * T * keys * (D + DV), K * keys * (D + DV) * k.element_size()), Cost(math.nan, math.nan)


SPEC = Spec(
    op=decode_attention,
    reference=reference,
    reference_backward=None,
    pytorch=pytorch,
    inputs=inputs,
    gradients=(),
    cost=cost,
    gpu=(
        dict(q=Shape((16, 32, 1, 128)), k=Shape((16, 8, 16384, 128)), v=Shape((16, 8, 16384, 128)),
             lengths=Shape((16,), below=16384)),
        dict(q=Shape((16, 32, 4, 64)), k=Shape((16, 8, 16384, 64)), v=Shape((16, 8, 16384, 64)),
             lengths=Shape((16,), below=16384), window=4096, softcap=50.0, sinks=Shape((32,))),
    ),
    cpu=(
        dict(q=Shape((1, 8, 1, 64)), k=Shape((1, 2, 2048, 64)), v=Shape((1, 2, 2048, 64)), lengths=Shape((1,), below=2048)),
        dict(q=Shape((8, 8, 1, 64)), k=Shape((8, 2, 2048, 64)), v=Shape((8, 2, 2048, 64)), lengths=Shape((8,), below=2048)),
    ),
)  # fmt: skip
