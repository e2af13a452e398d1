"""Softmax attention that never holds the whole matrix of scores: every mask is an interval of keys for each query.

    s_ij = scale q_i . k_j                                     (with softcap c: c tanh(s_ij / c); with ALiBi: - slope |i - j|)
    p_ij = exp(s_ij) / (sum_j' exp(s_ij') + exp(sink))         over the keys j that query i sees
    y_i = sum_j p_ij v_j        lse_i = log(sum_j' exp(s_ij') + exp(sink))

Dao et al. 2022, "FlashAttention" (arXiv:2205.14135) and Dao 2023, "FlashAttention-2" (arXiv:2307.08691): a tile of queries
goes through the tiles of keys with a running maximum and sum; the backward pass works p out again from lse.
ALiBi: Press et al. 2021 (arXiv:2108.12409). Softcap: Gemma Team 2024 (arXiv:2408.00118). Sinks: OpenAI 2025 (arXiv:2508.10925).
Window and global tokens: Beltagy et al. 2020 (arXiv:2004.05150). Prefix: Raffel et al. 2019 (arXiv:1910.10683).

What query i sees is an interval of keys: causality, a prefix seen by all, packed documents and padding each bound it, and
so does their intersection; only global tokens stand outside their interval. Both bounds grow with i, so the queries that
see one key are an interval too, and the same arithmetic serves the two sides of the matrix. A tile asks its rows for the
hull of their intervals, skips what lies outside, and masks only the tiles that not all rows see whole.

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
from kernels.launch import Function, apply, architecture, dot, launch, narrow, on_triton, power_of_2, programs, tl, triton
from kernels.query_blocks import torch_backward, torch_forward
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

LOG2E = tl.constexpr(1.4426950408889634)

# B batch, H query heads, K key/value heads, G = H / K, T queries, S keys, D head dim, Dv that of the values


def visible(i, j, causal, window, global_tokens, documents, prefix, key_lengths):
    """(B or 1, T, S) bool, on arrays or tensors: whether the token at i (T, 1) sees the one at j (S,)."""
    seen = (i == i) & (j[None, None] == j)
    if causal and prefix is None:
        seen = seen & (j <= i)
    elif causal:
        seen = seen & ((j <= i) | (j < prefix[:, None, None]))
    if window is not None:
        seen = seen & ((abs(i - j) < window) | (i < global_tokens) | (j < global_tokens))
    if documents is not None:
        seen = seen & (documents[:, len(j) - len(i) :, None] == documents[:, None])
    if key_lengths is not None:
        seen = seen & (j < key_lengths[:, None, None])
    return seen


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


@triton.jit
def intervals(x, low, high, count, limit, shift, back, ahead, window, exempt):
    """For rows x of `count`: what each sees of 0 … limit - 1 within its window, and without it: near, far, start, end.

    Row x stands at x + shift on the other side and sees from `back` before it to `ahead` after it, and what low and high
    say. The first `exempt` rows have no window. Rows past the last do as the last.
    """
    x = tl.minimum(x, count - 1)
    start, end = tl.maximum(x + shift - back, 0), tl.minimum(x + shift + ahead, limit)
    if low is not None:
        start, end = tl.maximum(start, tl.load(low + x)), tl.minimum(end, tl.load(high + x))
    near, far = start, end
    if window is not None:
        near, far = tl.maximum(start, x + shift - window + 1), tl.minimum(end, x + shift + window)
        if exempt is not None:
            far = tl.where(x < exempt, end, far)  # what lies before near is a global token itself
    return near, far, start, end


@triton.jit
def tiles(sight, others, BLOCK: tl.constexpr):
    """Which tiles of the other side rows see: those of global tokens [g, h), then [first, last), of which [full, cut) whole."""
    near, far, start, end = sight
    first = tl.min(near, 0) // BLOCK
    last = tl.maximum(tl.cdiv(tl.max(far, 0), BLOCK), first)
    full = tl.minimum(tl.cdiv(tl.max(near, 0), BLOCK), last)
    cut = tl.maximum(tl.min(far, 0) // BLOCK, full)
    g, h = first, first
    if others is not None:
        g = tl.min(start, 0) // BLOCK
        h = tl.maximum(tl.minimum(tl.cdiv(tl.minimum(others, tl.max(end, 0)), BLOCK), first), g)
    return g, h, first, last, full, cut


@triton.jit
def how_many(plan, MASKED: tl.constexpr):
    """Tiles that all rows see whole, or those that need their mask."""
    g, h, first, last, full, cut = plan
    return (h - g) + (last - first) - (cut - full) if MASKED else cut - full


@triton.jit
def nth(t, plan, MASKED: tl.constexpr):
    """The t-th of these: of [full, cut); or of [g, h) and what is left of [first, last)."""
    g, h, first, last, full, cut = plan
    if not MASKED:
        return full + t
    t += g
    t += tl.where(t >= h, first - h, 0)
    return t + tl.where(t >= full, cut - full, 0)


@triton.jit
def sees(y, sight, others):
    """(rows, y): whether a row sees y, as one comparison of how far inside it lies: predicates are dear on some devices."""
    near, far, start, end = sight
    y = y[None, :]
    inside = tl.minimum(y - near[:, None], far[:, None] - 1 - y)
    if others is not None:
        whole = tl.minimum(y - start[:, None], end[:, None] - 1 - y)
        inside = tl.maximum(inside, tl.minimum(whole, others - 1 - y))
    return inside >= 0


@triton.jit
def logits(s, apart, scale, softcap, slope):
    """From q . k to what exp2 takes, in two numbers, `power * factor`; and the capped logit / softcap, for its derivative."""
    capped, power, factor = s, s, scale * LOG2E
    if softcap is not None:
        x = s * (scale / softcap)
        x2 = x * x  # near 0 the series, where 1 - 2 / (e^2x + 1) would cancel
        series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835 - x2 * (1382 / 155925))))))
        capped = tl.where(tl.abs(x) < 0.35, series, 1 - 2 / (tl.exp(2 * x) + 1))
        power = capped * softcap
        factor = LOG2E
    if slope is not None:
        if softcap is None:
            power = s * scale
        power -= slope * tl.abs(apart).to(tl.float32)
        factor = LOG2E
    return power, factor, capped


@triton.jit
def load_rows(x, rows, stride, count, C: tl.constexpr, BLOCK: tl.constexpr, CUT: tl.constexpr):
    """Rows of a head, (rows, BLOCK), columns from C on 0; with CUT there may be some past the last, which read the last."""
    columns = tl.arange(0, BLOCK)[None, :]
    if CUT:
        rows = tl.minimum(rows, count - 1)
    at = x + rows[:, None].to(tl.int64) * stride + columns
    if BLOCK != C:
        return tl.load(at, columns < C, 0)
    return tl.load(at)


@triton.jit
def store_rows(x, rows, stride, count, values, C: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)[None, :]
    inside = rows[:, None] < count
    if BLOCK != C:
        inside &= columns < C
    tl.store(x + rows[:, None].to(tl.int64) * stride + columns, narrow(values, x.dtype.element_ty), inside)


@triton.jit
def forward_tile(
    tile, acc, m, total, q, k, v, k_t, v_t, i, S, sight, others, scale, softcap, slope,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    j = tile * N + tl.arange(0, N)
    s = dot(q, tl.trans(load_rows(k, j, k_t, S, D, BD, MASKED)), tl.zeros((q.shape[0], N), tl.float32))
    power, factor, _ = logits(s, i[:, None] - j[None, :], scale, softcap, slope)
    if MASKED:
        power = tl.where(sees(j, sight, others), power, float("-inf"))
    highest = tl.maximum(m, tl.max(power, 1) * factor)
    finite = highest
    if MASKED:  # a row may have seen nothing so far
        finite = tl.where(highest == float("-inf"), 0, highest)
    p = tl.exp2(power * factor - finite[:, None])
    shrink = tl.exp2(m - finite)
    values = load_rows(v, j, v_t, S, DV, BV, MASKED)
    return dot(narrow(p, values.dtype), values, acc * shrink[:, None]), highest, total * shrink + tl.sum(p, 1)


@triton.jit
def forward_kernel(
    q, k, v, y, base, shares, sinks, slopes, low, high, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, y_b, y_h, y_t,
    H, G, T, S, ahead, window, first_tokens, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """M queries of a head a program, over tiles of N keys; the last queries, which see the most keys, start first."""
    blocks = tl.cdiv(T, M)
    head = tl.program_id(0) // blocks
    rows = (blocks - 1 - tl.program_id(0) % blocks) * M + tl.arange(0, M)
    b, h, shift = (head // H).to(tl.int64), head % H, S - T
    k += b * k_b + (h // G) * k_h
    v += b * v_b + (h // G) * v_h
    if low is not None:
        low += b * T
        high += b * T
    exempt = first_tokens
    if first_tokens is not None:
        exempt = first_tokens - shift
    sight = intervals(rows, low, high, T, S, shift, S + T, ahead, window, exempt)
    plan = tiles(sight, first_tokens, N)
    slope = slopes
    if slopes is not None:
        slope = tl.load(slopes + h).to(tl.float32)
    queries = load_rows(q + b * q_b + h * q_h, rows, q_t, T, D, BD, True)
    acc = tl.zeros((M, BV), tl.float32)
    m = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    for MASKED in tl.static_range(2):
        for t in tl.range(0, how_many(plan, MASKED)):
            acc, m, total = forward_tile(nth(t, plan, MASKED), acc, m, total, queries, k, v, k_t, v_t, rows + shift, S, sight,
                                         first_tokens, scale, softcap, slope, D, DV, BD, BV, N, MASKED)  # fmt: skip
    at = head.to(tl.int64) * T + rows
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2E
        highest = tl.maximum(m, sink)
        acc *= tl.exp2(m - highest)[:, None]
        total = total * tl.exp2(m - highest) + tl.exp2(sink - highest)
        m = highest
        tl.store(shares + at, tl.exp2(sink - m) / total, rows < T)
    blind = total == 0  # y = 0; base is +inf, for exp2(s - base) to be 0
    total = tl.where(blind, 1, total)
    tl.store(base + at, tl.where(blind, float("inf"), m + tl.log2(total)), rows < T)
    store_rows(y + b * y_b + h * y_h, rows, y_t, T, acc / total[:, None], DV, BV)


@triton.jit
def query_tile(
    tile, dq, q, dy, z, delta, k, v, k_t, v_t, i, S, sight, others, scale, softcap, slope,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    j = tile * N + tl.arange(0, N)
    keys = load_rows(k, j, k_t, S, D, BD, MASKED)
    values = load_rows(v, j, v_t, S, DV, BV, MASKED)
    s = dot(q, tl.trans(keys), tl.zeros((q.shape[0], N), tl.float32))
    power, factor, capped = logits(s, i[:, None] - j[None, :], scale, softcap, slope)
    if MASKED:
        power = tl.where(sees(j, sight, others), power, float("-inf"))
    dp = dot(dy, tl.trans(values), tl.zeros((q.shape[0], N), tl.float32))
    ds = tl.exp2(power * factor - z[:, None]) * (dp - delta[:, None])
    if softcap is not None:
        ds *= 1 - capped * capped
    return dot(narrow(ds, keys.dtype), keys, dq)


@triton.jit
def query_kernel(
    q, k, v, y, dy, dlse, base, delta, dq, slopes, low, high, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, y_b, y_h, y_t,
    dy_b, dy_h, dy_t, dq_b, dq_h, dq_t, H, G, T, S, ahead, window, first_tokens, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradient of M queries a program, and their delta = dy . y - dlse, which the keys' kernel reads."""
    blocks = tl.cdiv(T, M)
    head = tl.program_id(0) // blocks
    rows = (blocks - 1 - tl.program_id(0) % blocks) * M + tl.arange(0, M)
    b, h, shift = (head // H).to(tl.int64), head % H, S - T
    k += b * k_b + (h // G) * k_h
    v += b * v_b + (h // G) * v_h
    if low is not None:
        low += b * T
        high += b * T
    exempt = first_tokens
    if first_tokens is not None:
        exempt = first_tokens - shift
    sight = intervals(rows, low, high, T, S, shift, S + T, ahead, window, exempt)
    plan = tiles(sight, first_tokens, N)
    slope = slopes
    if slopes is not None:
        slope = tl.load(slopes + h).to(tl.float32)
    queries = load_rows(q + b * q_b + h * q_h, rows, q_t, T, D, BD, True)
    grad = load_rows(dy + b * dy_b + h * dy_h, rows, dy_t, T, DV, BV, True)
    out = load_rows(y + b * y_b + h * y_h, rows, y_t, T, DV, BV, True)
    at = head.to(tl.int64) * T
    d = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if dlse is not None:
        d -= tl.load(dlse + at + rows, rows < T, 0)
    tl.store(delta + at + rows, d, rows < T)
    z = tl.load(base + at + rows, rows < T, float("inf"))
    acc = tl.zeros((M, BD), tl.float32)
    for MASKED in tl.static_range(2):
        for t in tl.range(0, how_many(plan, MASKED)):
            acc = query_tile(nth(t, plan, MASKED), acc, queries, grad, z, d, k, v, k_t, v_t, rows + shift, S, sight,
                             first_tokens, scale, softcap, slope, D, DV, BD, BV, N, MASKED)  # fmt: skip
    store_rows(dq + b * dq_b + h * dq_h, rows, dq_t, T, acc * scale, D, BD)


@triton.jit
def key_tile(
    tile, dk, dv, k, v, q, dy, base, delta, q_t, dy_t, j, T, shift, sight, others, scale, softcap, slope,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    rows = tile * M + tl.arange(0, M)
    queries = load_rows(q, rows, q_t, T, D, BD, MASKED)
    grad = load_rows(dy, rows, dy_t, T, DV, BV, MASKED)
    s = dot(k, tl.trans(queries), tl.zeros((k.shape[0], M), tl.float32))  # (N, M)
    power, factor, capped = logits(s, rows[None, :] + shift - j[:, None], scale, softcap, slope)
    if MASKED:
        power = tl.where(sees(rows, sight, others), power, float("-inf"))
    p = tl.exp2(power * factor - tl.load(base + rows, rows < T, float("inf"))[None, :])
    dv = dot(narrow(p, grad.dtype), grad, dv)
    dp = dot(v, tl.trans(grad), tl.zeros((k.shape[0], M), tl.float32))
    ds = p * (dp - tl.load(delta + rows, rows < T, 0)[None, :])
    if softcap is not None:
        ds *= 1 - capped * capped
    return dot(narrow(ds, queries.dtype), queries, dk), dv


@triton.jit
def key_kernel(
    q, k, v, dy, base, delta, dk, dv, slopes, low, high, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    dy_b, dy_h, dy_t, K, G, T, S, groups, parts, back, window, first_tokens, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradients of N keys and values a program, from every `parts`-th query head that reads them; dk, dv contiguous."""
    blocks = tl.cdiv(S, N)
    group = tl.program_id(0) // blocks  # (part, batch, kv head)
    cols = tl.program_id(0) % blocks * N + tl.arange(0, N)
    part, b, kv, shift = group // groups, (group % groups // K).to(tl.int64), group % K, S - T
    if low is not None:
        low += b * S
        high += b * S
    others = first_tokens
    if first_tokens is not None:
        others = first_tokens - shift
    sight = intervals(cols, low, high, S, T, -shift, back, S + T, window, first_tokens)
    plan = tiles(sight, others, M)
    keys = load_rows(k + b * k_b + kv * k_h, cols, k_t, S, D, BD, True)
    values = load_rows(v + b * v_b + kv * v_h, cols, v_t, S, DV, BV, True)
    dkeys, dvalues = tl.zeros((N, BD), tl.float32), tl.zeros((N, BV), tl.float32)
    for h in tl.range(kv * G + part, kv * G + G, parts):
        slope = slopes
        if slopes is not None:
            slope = tl.load(slopes + h).to(tl.float32)
        at = (b * K * G + h) * T
        for MASKED in tl.static_range(2):
            for t in tl.range(0, how_many(plan, MASKED)):
                dkeys, dvalues = key_tile(
                    nth(t, plan, MASKED), dkeys, dvalues, keys, values, q + b * q_b + h * q_h, dy + b * dy_b + h * dy_h,
                    base + at, delta + at, q_t, dy_t, cols, T, shift, sight, others, scale, softcap, slope,
                    D, DV, BD, BV, M, MASKED,
                )  # fmt: skip
    store_rows(dk + group.to(tl.int64) * S * D, cols, D, S, dkeys * scale, D, BD)
    store_rows(dv + group.to(tl.int64) * S * DV, cols, DV, S, dvalues, DV, BV)


def tile_sizes(q: Tensor, D: int, DV: int) -> tuple[dict, dict, dict]:
    """Tiles of the forward, the queries' and the keys' kernel: as large as registers allow, so that numbers are read seldom."""
    BD, BV = max(16, power_of_2(D)), max(16, power_of_2(DV))
    wide, device = max(BD, BV), architecture(q.device)

    def sizes(M: int, N: int, warps: int, stages: int) -> dict:
        return dict(D=D, DV=DV, BD=BD, BV=BV, M=M, N=N, num_warps=warps, num_stages=stages)

    if q.device.type == "cpu":  # the interpreter's: small, so that few rows make several tiles
        return sizes(32, 16, 4, 1), sizes(16, 32, 4, 1), sizes(16, 32, 4, 1)
    if q.dtype == torch.float32:  # exact products, without tensor cores
        if wide <= 64:
            return sizes(32, 16, 8, 1), sizes(32, 16, 8, 1), sizes(16, 32, 8, 1)
        return sizes(16, 16, 8, 1), sizes(16, 16, 8, 1), sizes(16, 16, 4 if device.startswith("sm_8") else 8, 1)
    if wide > 128:
        return sizes(128, 32, 8, 2), sizes(32, 32, 8, 1), sizes(16, 32, 8, 1)
    if device.startswith("gfx"):
        return sizes(128, 64, 8, 2), sizes(64, 64, 4, 2), sizes(32, 64, 4, 2)
    if device == "sm_90":
        return sizes(128, 128, 8, 2), sizes(128, 64, 8, 2), sizes(32, 128, 8, 2)
    keys = sizes(32, 64, 4, 1) if device.startswith("sm_1") and wide > 64 else sizes(32, 64, 8, 2)
    return sizes(128, 64, 8, 2), sizes(64, 64, 8, 2), keys


def dense(x: Tensor | None) -> Tensor | None:
    """x with numbers of a row side by side."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def triton_forward(q, k, v, sinks, slopes, low, high, causal, window, first_tokens, scale, softcap):
    (B, H, T, D), (_, K, S, DV) = q.shape, v.shape
    y = q.new_empty(B, T, H, DV).transpose(1, 2)  # as the output projection will read it
    base = q.new_empty(B, H, T, dtype=torch.float32)  # lse as the kernels use it: base 2, +inf for -inf
    shares = None if sinks is None else torch.empty_like(base)
    sizes = tile_sizes(q, D, DV)[0]
    launch(
        forward_kernel, (-(-T // sizes["M"]) * B * H,), q, k, v, y, base, shares, sinks, slopes, low, high,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:3], H, H // K, T, S,
        1 if causal and low is None else S + T, window, first_tokens, scale, softcap, **sizes,
    )  # fmt: skip
    return y, base, shares


def triton_backward(q, k, v, slopes, low, high, y, base, dy, dlse, causal, window, first_tokens, scale, softcap):
    (B, H, T, D), (_, K, S, DV) = q.shape, v.shape
    _, for_queries, for_keys = tile_sizes(q, D, DV)
    dq, delta = torch.empty_like(q), torch.empty_like(base)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    launch(
        query_kernel, (-(-T // for_queries["M"]) * B * H,), q, k, v, y, dy, dlse, base, delta, dq, slopes, low, high, *strides,
        *y.stride()[:3], *dy.stride()[:3], *dq.stride()[:3], H, H // K, T, S,
        1 if causal and low is None else S + T, window, first_tokens, scale, softcap, **for_queries,
    )  # fmt: skip
    if low is not None:  # the queries that see key j: from the first whose interval ends after j to the last that begins by j
        at = torch.arange(S, device=q.device).expand(B, S).contiguous()
        low, high = (
            torch.searchsorted(high, at, right=True, out_int32=True),
            torch.searchsorted(low, at, right=True, out_int32=True),
        )
    blocks = -(-S // for_keys["N"]) * B * K
    parts = max(1, min(H // K, programs(q.device, 1) // max(1, blocks)))  # of a group's heads, where programs would be few
    dk, dv = (x.new_empty(parts, *x.shape, dtype=x.dtype if parts == 1 else torch.float32) for x in (k, v))
    launch(
        key_kernel, (blocks * parts,), q, k, v, dy, base, delta, dk, dv, slopes, low, high, *strides, *dy.stride()[:3],
        K, H // K, T, S, B * K, parts, 0 if causal and low is None else S + T, window, first_tokens, scale, softcap,
        **for_keys,
    )  # fmt: skip
    dk, dv = (x[0] if parts == 1 else x.sum(0).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv, delta


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


def spans(
    B: int, T: int, S: int, *, causal: bool = True, documents: Tensor | None = None, prefix: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of which keys each query sees some, whatever the window: (low, high), both (B, T) int32, keys low … high - 1.

    What `attention` makes of its own `documents`, `prefix` and `key_lengths`; layers that share them can share this.
    """
    device = next(x for x in (documents, prefix, key_lengths) if x is not None).device
    low, high = torch.zeros(B, T, dtype=torch.int64, device=device), torch.full((B, T), S, device=device)
    if causal:
        past = torch.arange(S - T + 1, S + 1, device=device).expand(B, T)
        high = past if prefix is None else past.maximum(prefix[:, None]).clamp(max=S)
    if documents is not None:
        at = torch.arange(S, device=device).expand(B, S)
        borders = documents[:, 1:] != documents[:, :-1]
        starts = F.pad(torch.where(borders, at[:, 1:], 0), (1, 0)).cummax(1).values if S else at
        ends = F.pad(torch.where(borders, at[:, 1:], S), (0, 1), value=S).flip(1).cummin(1).values.flip(1) if S else at
        low, high = starts[:, S - T :], high.minimum(ends[:, S - T :])
    if key_lengths is not None:
        high = high.minimum(key_lengths[:, None])
    return low.to(torch.int32).contiguous(), high.to(torch.int32).contiguous()


def document_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """(1, length) int64: what `documents` takes, from where documents begin and the last ends, (N + 1,) rising from 0."""
    return torch.searchsorted(cu_seqlens[1:], torch.arange(length, device=cu_seqlens.device), right=True)[None]


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
    groups = q.shape[1] // k.shape[1]
    q, k, v = dense(q), *(dense(x if groups == 1 else x.repeat_interleave(groups, 1)) for x in (k, v))
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
    ),
    cpu=(
        dict(q=Shape((16, 4, 256, 64)), k=Shape((16, 4, 256, 64)), v=Shape((16, 4, 256, 64))),
        dict(q=Shape((4, 8, 1024, 64)), k=Shape((4, 2, 1024, 64)), v=Shape((4, 2, 1024, 64))),
    ),
)  # fmt: skip
