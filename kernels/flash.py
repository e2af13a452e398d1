"""The Triton path of kernels/attention.py: a tile of queries goes through the tiles of keys it may see, forward and backward.

Dao et al. 2022, "FlashAttention" (arXiv:2205.14135) and Dao 2023, "FlashAttention-2" (arXiv:2307.08691): the forward kernel
keeps a running maximum and sum, the backward kernels work p out again from lse, one by rows for dq, one by columns for dk
and dv. Exponentials are to the base 2, as the hardware has them.
"""

import torch
from torch import Tensor

from kernels.intervals import how_many, intervals, nth, sees, tiles
from kernels.launch import architecture, dot, launch, narrow, power_of_2, programs, tanh, tl, triton

LOG2E = tl.constexpr(1.4426950408889634)

# B batch, H query heads, K key/value heads, G = H / K, T queries, S keys, D head dim, Dv that of the values


@triton.jit
def logits(s, apart, scale, softcap, slope):
    """From q . k to what exp2 takes, in two numbers, `power * factor`; and the capped logit / softcap, for its derivative."""
    capped, power, factor = s, s, scale * LOG2E
    if softcap is not None:
        capped = tanh(s * (scale / softcap))
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
def queries_of(low, high, H, T, S, ahead, window, first_tokens, M: tl.constexpr):
    """This program's head, counted over the batch, its M queries, and what they see; the last ones, which see most, first."""
    blocks = tl.cdiv(T, M)
    head = tl.program_id(0) // blocks
    rows = (blocks - 1 - tl.program_id(0) % blocks) * M + tl.arange(0, M)
    shift = S - T
    if low is not None:
        low += (head // H).to(tl.int64) * T
        high += (head // H).to(tl.int64) * T
    exempt = first_tokens
    if first_tokens is not None:
        exempt = first_tokens - shift
    return head, rows, intervals(rows, low, high, T, S, shift, S + T, ahead, window, exempt)


@triton.jit
def forward_kernel(
    q, k, v, y, base, shares, sinks, slopes, low, high, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, y_b, y_h, y_t,
    H, G, T, S, ahead, window, first_tokens, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """M queries of a head a program, over tiles of N keys."""
    head, rows, sight = queries_of(low, high, H, T, S, ahead, window, first_tokens, M)
    b, h, shift = (head // H).to(tl.int64), head % H, S - T
    k += b * k_b + (h // G) * k_h
    v += b * v_b + (h // G) * v_h
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
    head, rows, sight = queries_of(low, high, H, T, S, ahead, window, first_tokens, M)
    b, h, shift = (head // H).to(tl.int64), head % H, S - T
    k += b * k_b + (h // G) * k_h
    v += b * v_b + (h // G) * v_h
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
    """Tiles of the forward, the queries' and the keys' kernel: as large as registers allow, so that numbers are read seldom.

    On NVIDIA's devices the queries' kernel spills some 200 bytes for heads wider than 128 in float32 at any size tried.
    """
    BD, BV = max(16, power_of_2(D)), max(16, power_of_2(DV))
    wide, device = max(BD, BV), architecture(q.device)

    def sizes(M: int, N: int, warps: int, stages: int) -> dict:
        return dict(D=D, DV=DV, BD=BD, BV=BV, M=M, N=N, num_warps=warps, num_stages=stages)

    if q.device.type == "cpu":  # the interpreter's: small, so that few rows make several tiles
        return sizes(32, 16, 4, 1), sizes(16, 32, 4, 1), sizes(16, 32, 4, 1)
    if q.dtype == torch.float32:  # exact products, without tensor cores
        if wide <= 64:
            return sizes(32, 16, 8, 1), sizes(32, 16, 8, 1), sizes(16, 32, 8, 1)
        if wide > 128 and device.startswith("gfx"):
            return sizes(16, 16, 8, 1), sizes(16, 16, 4, 1), sizes(16, 16, 4, 1)
        return sizes(16, 16, 8, 1), sizes(16, 16, 8, 1), sizes(16, 16, 4 if device.startswith("sm_8") else 8, 1)
    if wide > 128:
        if device.startswith("gfx"):
            return sizes(64, 32, 4, 1), sizes(16, 32, 4, 1), sizes(16, 32, 4, 1)
        if device.startswith("sm_8"):
            return sizes(64, 64, 8, 2), sizes(64, 32, 8, 2), sizes(16, 32, 8, 1)
        return sizes(128, 32, 8, 2), sizes(32, 32, 4 if device.startswith("sm_1") else 8, 1), sizes(16, 32, 8, 1)
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
