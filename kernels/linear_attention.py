"""Linear attention in chunks: a matrix state that decays by nothing, by one number a head, or by one a channel.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T            S (D, V) a head; g is 0, (H,), (B, T, H) or (B, T, H, D), at most 0
    o_t = scale S_t^T q_t

g = 0 is linear attention (Katharopoulos et al. 2020, arXiv:2006.16236); a constant a head, retention (Sun et al. 2023,
arXiv:2307.08621) and lightning attention (Qin et al. 2024, arXiv:2401.04658); one number a head and time, Mamba-2 (ssd.py);
one a channel, GLA (Yang et al. 2023, arXiv:2312.06635) and HGRN2 (Qin et al. 2024, arXiv:2404.07904: k = 1 - exp(g)).

Within a chunk of L times, c the running sum of g in it, o_i = sum_{j <= i} (q_i exp(c_i - c_j) k_j) v_j + (q_i exp(c_i)) S.
With gates a channel the exponential does not leave the product, and exp(-c_j) alone overflows: GLA's section 4.3 takes c
relative to sub-chunks. Here the chunk is halved again and again: between the later and the earlier half of a block c is
taken relative to the middle, q exp(c_i - c_m) and k exp(c_m - c_j), so that all exponents are at most 0 and all is matmuls.
With documents, runs of equal numbers, the state is dropped at a run's first time; the initial state belongs to the first.

With B T H rows of D and V numbers of b bytes (log2 L more products of L D with gates a channel):
    forward    2 B T H (L (D + V) / 2 + 2 D V) FLOPs      B T H (2 D + 2 V) b + 8 B T H D V / L bytes moved
    backward   2 B T H (5 L (D + V) / 4 + 5 D V) FLOPs    B T H (4 D + 3 V) b + 16 B T H D V / L bytes moved
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.chunks import Chunks, chunk_length
from kernels.launch import Function, apply, dot, launch, narrow, on_triton, power_of_2, tl, triton
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

# B batch, T time, H heads, G groups of heads that share q and k, D key width, V value width, L times of a chunk, n chunks


def decays(q, v, g, documents):
    """exp(g) as (B, T, H, D), 0 where a document begins."""
    a = np.ones((*v.shape[:3], q.shape[-1]))
    if g is not None:
        a = a * np.exp(g if g.ndim == 4 else g[..., None])
    if documents is not None and v.shape[1] > 0:
        a[:, 1:] *= (documents[:, 1:] == documents[:, :-1])[..., None, None]
    return a


def reference(q, k, v, g=None, *, scale=None, initial_state=None, documents=None):
    (B, T, H, V), D = v.shape, q.shape[-1]
    scale, a = D**-0.5 if scale is None else scale, decays(q, v, g, documents)
    q, k = (np.repeat(x, H // q.shape[2], 2) for x in (q, k))
    S = np.zeros((B, H, D, V)) if initial_state is None else initial_state
    o = np.zeros(v.shape)
    for t in range(T):
        S = a[:, t, ..., None] * S + k[:, t, ..., None] * v[:, t, :, None]
        o[:, t] = scale * (q[:, t, ..., None] * S).sum(2)
    return o, S


def reference_backward(grads, q, k, v, g=None, *, scale=None, initial_state=None, documents=None):
    (B, T, H, V), (G, D) = v.shape, q.shape[2:]
    scale, a = D**-0.5 if scale is None else scale, decays(q, v, g, documents)
    q, k = (np.repeat(x, H // G, 2) for x in (q, k))
    S = [np.zeros((B, H, D, V)) if initial_state is None else initial_state]
    for t in range(T):
        S.append(a[:, t, ..., None] * S[t] + k[:, t, ..., None] * v[:, t, :, None])
    dq, dk, dv, dg = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape), np.zeros(a.shape)
    do = np.zeros(v.shape) if grads[0] is None else grads[0]
    dS = np.zeros(S[0].shape) if grads[1] is None else grads[1]
    for t in reversed(range(T)):
        dq[:, t] = scale * (S[t + 1] * do[:, t, :, None]).sum(-1)
        dS = dS + scale * q[:, t, ..., None] * do[:, t, :, None]
        dk[:, t], dv[:, t] = (dS * v[:, t, :, None]).sum(-1), (dS * k[:, t, ..., None]).sum(2)
        dg[:, t] = a[:, t] * (dS * S[t]).sum(-1)
        dS = a[:, t, ..., None] * dS
    dq, dk = (x.reshape(B, T, G, H // G, D).sum(3) for x in (dq, dk))
    found = dict(q=dq, k=dk, v=dv)
    if g is not None:
        found["g"] = dg if g.ndim == 4 else dg.sum(-1) if g.ndim == 3 else dg.sum((0, 1, 3))
    if initial_state is not None:
        found["initial_state"] = dS
    return found


@triton.jit
def place(start, row, h, d, H, D):
    """Where row `row` of a chunk is, of head h the numbers d; the chunk begins with row `start` of all."""
    return (start.to(tl.int64) * H + h) * D + (row * (H * D) + d)


@triton.jit
def rows(x, start, row, h, d, rest, H, D):
    """The numbers d of a chunk's rows as (times, numbers), 0 from time `rest` on."""
    return tl.load(x + place(start, row, h, d, H, D), (row < rest) & (d < D), 0)


@triton.jit
def picked(chosen, x, acc):
    """acc + chosen @ x for a matrix of true and false, with all digits of x: three products of 8 bits each."""
    mask = tl.where(chosen, 1.0, 0.0).to(tl.bfloat16)
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return dot(mask, high, dot(mask, middle, dot(mask, low, acc)))


@triton.jit
def summed(chosen, g, start, row, h, d, rest, H, D, GATE: tl.constexpr):
    """Sums of the log decay over the times that each row of `chosen` (rows, L) names: no difference of longer sums, which
    would lose the digits of the small ones. (rows, 1) for one a head, (rows, numbers) for one a channel."""
    if GATE == 2:
        now = rows(g, start, row, h, d, rest, H, D).to(tl.float32)
        total = picked(chosen, now, tl.zeros((chosen.shape[0], d.shape[1]), tl.float32))
    else:
        now = tl.load(g + place(start, row, h, 0, H, 1), row < rest, 0).to(tl.float32)
        total = tl.sum(tl.where(chosen, tl.trans(now), 0), 1, keep_dims=True)
    return total


@triton.jit
def edges(g, runs, start, row, h, d, first, last, rest, H, D, GATE: tl.constexpr):
    """How much of the incoming state each row sees, and how much of them is in the outgoing one."""
    seen, left = tl.full(row.shape, 1, tl.float32), tl.full(row.shape, 1, tl.float32)
    if GATE > 0:
        seen = tl.exp(summed(row >= tl.trans(row), g, start, row, h, d, rest, H, D, GATE))
        left = tl.exp(summed(row < tl.trans(row), g, start, row, h, d, rest, H, D, GATE))
    if runs is not None:
        run = tl.load(runs + start + row, row < rest, -1)
        before = tl.load(runs + start - tl.minimum(first, 1))
        after = tl.load(runs + start + last)
        seen = tl.where(run == tl.where(first > 0, before, 0), seen, 0)
        left = tl.where(run == after, left, 0)
    return seen, left


@triton.jit
def through(g, runs, start, row, h, d, first, last, rest, H, D, GATE: tl.constexpr):
    """How much of the incoming state is in the outgoing one: (1, numbers)."""
    kept = tl.full(d.shape, 1, tl.float32)
    if GATE == 2:
        kept = tl.exp(tl.sum(rows(g, start, row, h, d, rest, H, D).to(tl.float32), 0, keep_dims=True))
    if GATE == 1:
        now = tl.load(g + place(start, row, h, 0, H, 1), row < rest, 0).to(tl.float32)
        kept *= tl.exp(tl.sum(now, 0, keep_dims=True))
    if runs is not None:
        before = tl.load(runs + start - tl.minimum(first, 1))
        kept = tl.where(tl.load(runs + start + last) == tl.where(first > 0, before, 0), kept, 0)
    return kept


@triton.jit
def states_kernel(
    x, v, g, runs, initial, borders, final, scale, T, n, H, G, D, V, VB,
    GATE: tl.constexpr, BACK: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The state from chunk to chunk, a block of it a program. Forward: x is k, borders get the state a chunk begins with.
    Backward: x is q and v the gradient of o; borders get the gradient of the state that a chunk ends with."""
    head = tl.program_id(1)
    b, h = head // H, head % H
    d, e = tl.program_id(0) // VB * BD + tl.arange(0, BD), tl.program_id(0) % VB * BV + tl.arange(0, BV)
    tile = d[:, None] * V + e[None, :]
    inside = (d < D)[:, None] & (e < V)[None, :]
    S = tl.zeros((BD, BV), tl.float32)
    if initial is not None:
        S += tl.load(initial + head.to(tl.int64) * D * V + tile, inside, 0).to(tl.float32)
    for i in range(n):
        chunk = n - 1 - i if BACK else i
        first = chunk * L
        start, rest = b * T + first, T - first
        last = tl.minimum(L, rest) - 1
        tl.store(borders + (head * n + chunk).to(tl.int64) * D * V + tile, S, inside)
        row = tl.arange(0, L)[:, None]
        values = narrow(rows(v, start, row, h, e[None, :], rest, H, V), x.dtype.element_ty)
        seen, left = edges(g, runs, start, row, h, d[None, :], first, last, rest, H, D, GATE)
        weighted = rows(x, start, row, h // (H // G), d[None, :], rest, G, D).to(tl.float32) * (seen * scale if BACK else left)
        S *= tl.trans(through(g, runs, start, row, h, d[None, :], first, last, rest, H, D, GATE))
        S = dot(tl.trans(narrow(weighted, values.dtype)), values, S)
    if final is not None:
        tl.store(final + head.to(tl.int64) * D * V + tile, S, inside)


@triton.jit
def half(row, s):
    """Of blocks of 2 s times: whether row i is in the later half, and (i, j) which times lie between it and the middle."""
    later, other = (row & s) > 0, tl.trans(row)
    return later, ((row ^ other) < s) & (tl.where(later, row - other, other - row - 1) >= 0)


@triton.jit
def scores(A, q, k, g, start, row, h, d, rest, H, D, GATE: tl.constexpr, L: tl.constexpr, LEVELS):
    """A + q k^T of one block of channels; with gates a channel decayed, and without the diagonal. For j > i no meaning."""
    if GATE == 2:
        for level in range(LEVELS):
            s = L >> (level + 1)
            later, between = half(row, s)
            size = tl.exp(summed(between, g, start, row, h, d, rest, H, D, GATE))
            x, y = narrow(tl.where(later, q * size, 0), q.dtype), narrow(tl.where(later, 0, k * size), k.dtype)
            A += tl.where((row ^ tl.trans(row)) < 2 * s, dot(x, tl.trans(y), tl.zeros((L, L), tl.float32)), 0)
    else:
        A = dot(q, tl.trans(k), A)
    return A


@triton.jit
def on_diagonal(x, row):
    """x (rows, 1) as the diagonal of a matrix."""
    return tl.where(row == tl.trans(row), x, 0)


@triton.jit
def weights(g, runs, start, row, h, rest, H, GATE: tl.constexpr, L: tl.constexpr):
    """What scores (L, L) are multiplied by: 1 or the decay of a head where j <= i of the same run, else 0."""
    i, j = row, tl.trans(row)
    w = tl.full((L, L), 1, tl.float32)
    if GATE == 1:
        now = tl.load(g + place(start, row, h, 0, H, 1), row < rest, 0).to(tl.float32)
        w = tl.exp(tl.cumsum(tl.where(row > tl.trans(row), now, 0), 0))  # the sum over j < l <= i
    w = tl.where(i >= j, w, 0)
    if runs is not None:
        same = tl.load(runs + start + i, i < rest, -1) == tl.load(runs + start + j, j < rest, -1)
        w = tl.where(same, w, 0)
    return w


@triton.jit
def output_kernel(
    q, k, v, g, runs, borders, o, scale, T, n, H, G, D, V, VB, DB, LEVELS,
    GATE: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One chunk and one block of values a program."""
    head, chunk = tl.program_id(1), tl.program_id(0) // VB
    b, h, first = head // H, head % H, chunk * L
    row, e = tl.arange(0, L)[:, None], tl.program_id(0) % VB * BV + tl.arange(0, BV)[None, :]
    start, rest = b * T + first, T - first
    last = tl.minimum(L, rest) - 1
    A, out, own = tl.zeros((L, L), tl.float32), tl.zeros((L, BV), tl.float32), tl.zeros((L, 1), tl.float32)
    for block in range(DB):
        d = block * BD + tl.arange(0, BD)[None, :]
        queries, keys = (rows(q, start, row, h // (H // G), d, rest, G, D), rows(k, start, row, h // (H // G), d, rest, G, D))
        seen, _ = edges(g, runs, start, row, h, d, first, last, rest, H, D, GATE)
        at = (head * n + chunk).to(tl.int64) * D * V + tl.trans(d) * V + e
        S = tl.load(borders + at, (tl.trans(d) < D) & (e < V), 0)
        out = dot(narrow(queries * seen, queries.dtype), narrow(S, queries.dtype), out)
        A = scores(A, queries, keys, g, start, row, h, d, rest, H, D, GATE, L, LEVELS)
        if GATE == 2:
            own += tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1, keep_dims=True)
    A += on_diagonal(own, row)
    A *= weights(g, runs, start, row, h, rest, H, GATE, L)
    values = narrow(rows(v, start, row, h, e, rest, H, V), q.dtype.element_ty)
    out = dot(narrow(A, values.dtype), values, out) * scale
    tl.store(o + place(start, row, h, e, H, V), out, (row < rest) & (e < V))


@triton.jit
def values_kernel(
    q, k, v, g, runs, dborders, do, dv, dg, scale, T, n, H, G, D, V, VB, DB, LEVELS,
    GATE: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of v, one chunk of one head a program; and of one decay a head what pairs within the chunk say."""
    head, chunk = tl.program_id(1), tl.program_id(0)
    b, h, first = head // H, head % H, chunk * L
    group = h // (H // G)
    row = tl.arange(0, L)[:, None]
    start, rest = b * T + first, T - first
    last = tl.minimum(L, rest) - 1
    state = (head * n + chunk).to(tl.int64) * D * V
    A, own = tl.zeros((L, L), tl.float32), tl.zeros((L, 1), tl.float32)
    for block in range(DB):
        d = block * BD + tl.arange(0, BD)[None, :]
        queries, keys = rows(q, start, row, group, d, rest, G, D), rows(k, start, row, group, d, rest, G, D)
        A = scores(A, queries, keys, g, start, row, h, d, rest, H, D, GATE, L, LEVELS)
        if GATE == 2:
            own += tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1, keep_dims=True)
    A += on_diagonal(own, row)
    A *= weights(g, runs, start, row, h, rest, H, GATE, L) * scale
    if GATE == 1:
        dA = tl.zeros((L, L), tl.float32)
        for block in range(VB):
            e = block * BV + tl.arange(0, BV)[None, :]
            douts, values = rows(do, start, row, h, e, rest, H, V), rows(v, start, row, h, e, rest, H, V)
            dA = dot(narrow(douts, q.dtype.element_ty), tl.trans(narrow(values, q.dtype.element_ty)), dA)
        earlier = tl.cumsum(A * dA, 1)  # (i, j): all pairs of i with times up to j
        flows = tl.sum(tl.where(row > tl.trans(row), earlier, 0), 0, keep_dims=True)  # from up to j to beyond it
        slope = tl.sum(tl.where(row == tl.trans(row) + 1, flows, 0), 1, keep_dims=True)
        tl.store(dg + place(start, row, h, 0, H, 1), slope, row < rest)
    for block in range(VB):
        e = block * BV + tl.arange(0, BV)[None, :]
        douts = narrow(rows(do, start, row, h, e, rest, H, V), q.dtype.element_ty)
        found = dot(tl.trans(narrow(A, douts.dtype)), douts, tl.zeros((L, BV), tl.float32))
        for inner in range(DB):
            d = inner * BD + tl.arange(0, BD)[None, :]
            _, left = edges(g, runs, start, row, h, d, first, last, rest, H, D, GATE)
            keys = rows(k, start, row, group, d, rest, G, D)
            dS = tl.load(dborders + state + tl.trans(d) * V + e, (tl.trans(d) < D) & (e < V), 0)
            found = dot(narrow(keys * left, keys.dtype), narrow(dS, keys.dtype), found)
        tl.store(dv + place(start, row, h, e, H, V), found, (row < rest) & (e < V))


@triton.jit
def backward_kernel(
    q, k, v, g, runs, borders, dborders, do, dq, dk, dg, scale, T, n, H, G, D, V, VB, DB, LEVELS,
    GATE: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One chunk of one head a program. The decay's gradient at t is what flows from times before t to t and later: pairs
    within the chunk, into it, out of it, and through it; no sum reaches beyond the chunk, so none loses its digits."""
    head, chunk = tl.program_id(1), tl.program_id(0)
    b, h, first = head // H, head % H, chunk * L
    group = h // (H // G)
    row = tl.arange(0, L)[:, None]
    start, rest = b * T + first, T - first
    last = tl.minimum(L, rest) - 1
    state = (head * n + chunk).to(tl.int64) * D * V
    dA = tl.zeros((L, L), tl.float32)
    for block in range(VB):
        e = block * BV + tl.arange(0, BV)[None, :]
        douts, values = rows(do, start, row, h, e, rest, H, V), rows(v, start, row, h, e, rest, H, V)
        dA = dot(narrow(douts, q.dtype.element_ty), tl.trans(narrow(values, q.dtype.element_ty)), dA)
    w = weights(g, runs, start, row, h, rest, H, GATE, L) * scale
    slope, own = tl.zeros((L, 1), tl.float32), tl.zeros((L, 1), tl.float32)
    flow_in, flow_out = tl.zeros((L, 1), tl.float32), tl.zeros((L, 1), tl.float32)
    if GATE == 2:
        own += tl.sum(on_diagonal(dA * w, row), 1, keep_dims=True)
    dA *= w
    for block in range(DB):
        d = block * BD + tl.arange(0, BD)[None, :]
        queries, keys = rows(q, start, row, group, d, rest, G, D), rows(k, start, row, group, d, rest, G, D)
        dqs, dks = tl.zeros((L, BD), tl.float32), tl.zeros((L, BD), tl.float32)
        kept = tl.zeros((1, BD), tl.float32)
        for inner in range(VB):
            e = inner * BV + tl.arange(0, BV)[:, None]
            inside = (e < V) & (d < D)
            S = tl.load(borders + state + d * V + e, inside, 0)  # (BV, BD)
            dS = tl.load(dborders + state + d * V + e, inside, 0)
            douts, values = rows(do, start, row, h, tl.trans(e), rest, H, V), rows(v, start, row, h, tl.trans(e), rest, H, V)
            dqs = dot(narrow(douts, queries.dtype), narrow(S, queries.dtype), dqs)
            dks = dot(narrow(values, queries.dtype), narrow(dS, queries.dtype), dks)
            kept += tl.sum(S * dS, 0, keep_dims=True)
        seen, left = edges(g, runs, start, row, h, d, first, last, rest, H, D, GATE)
        dqs *= seen * scale
        dks *= left
        if GATE > 0:
            kept *= through(g, runs, start, row, h, d, first, last, rest, H, D, GATE)
        into, out_of = queries * dqs, keys * dks
        if GATE == 1:
            flow_in += tl.sum(into, 1, keep_dims=True)
            flow_out += tl.sum(out_of, 1, keep_dims=True)
            slope += tl.sum(kept)
        if GATE == 2:
            slopes = picked(row <= tl.trans(row), into, tl.zeros((L, BD), tl.float32)) + kept
            slopes = picked(row > tl.trans(row), out_of, slopes)
            dqs += own * keys
            dks += own * queries
            for level in range(LEVELS):
                s = L >> (level + 1)
                is_later, between = half(row, s)
                size = tl.exp(summed(between, g, start, row, h, d, rest, H, D, GATE))
                pairs = narrow(tl.where((row ^ tl.trans(row)) < 2 * s, dA, 0), queries.dtype)
                x, y = (
                    narrow(tl.where(is_later, queries * size, 0), queries.dtype),
                    narrow(tl.where(is_later, 0, keys * size), keys.dtype),
                )
                dx = tl.where(is_later, dot(pairs, y, tl.zeros((L, BD), tl.float32)) * size, 0)
                dy = tl.where(is_later, 0, dot(tl.trans(pairs), x, tl.zeros((L, BD), tl.float32)) * size)
                slopes = picked(tl.trans(between), queries * dx + keys * dy, slopes)
                dqs += dx
                dks += dy
            tl.store(dg + place(start, row, h, d, H, D), slopes, (row < rest) & (d < D))
        else:
            dqs = dot(narrow(dA, keys.dtype), keys, dqs)
            dks = dot(tl.trans(narrow(dA, queries.dtype)), queries, dks)
        at = place(start, row, h, d, H, D)
        tl.store(dq + at, dqs, (row < rest) & (d < D))
        tl.store(dk + at, dks, (row < rest) & (d < D))
    if GATE == 1:
        slope += tl.load(dg + place(start, row, h, 0, H, 1), row < rest, 0)  # the pairs, by values_kernel
        slope += tl.sum(tl.where(row <= tl.trans(row), tl.trans(flow_in), tl.trans(flow_out)), 1, keep_dims=True)
        tl.store(dg + place(start, row, h, 0, H, 1), slope, row < rest)


@torch.library.custom_op("rosetta::linear_attention", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor, runs: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the states that the chunks begin with, and the last state."""
    return Chunks(q, k, v, g, runs, scale).forward(initial)


@attend.register_fake
def _(q, k, v, g, initial, runs, scale):
    (B, T, H, V), (G, D) = v.shape, q.shape[2:]
    L = chunk_length(T, 0 if g is None else g.ndim - 2)
    return initial.new_empty(v.shape), initial.new_empty(B, G, -(-T // L), D, H // G * V), torch.empty_like(initial)


@torch.library.custom_op("rosetta::linear_attention_backward", mutates_args=())
def attend_backward(
    do: Tensor, dS: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, states: Tensor, runs: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g (of no shape without it) and the initial state."""
    return Chunks(q, k, v, g, runs, scale).backward(do, dS, states)


@attend_backward.register_fake
def _(do, dS, q, k, v, g, states, runs, scale):
    return *(states.new_empty(x.shape) for x in (q, k, v)), states.new_empty(() if g is None else g.shape), torch.empty_like(dS)


def tiles(q: Tensor, v: Tensor, gate: int) -> dict:
    """Constants of the kernels: smaller blocks where products are in float32 or many, which take more registers."""
    longest, widest = (32 if q.dtype == torch.float32 or gate == 2 else 64), (16 if gate == 2 else 32)
    L, BD, BV = (
        min(m, max(16, power_of_2(x))) for m, x in ((longest, q.shape[1]), (widest, q.shape[-1]), (widest, v.shape[-1]))
    )
    return dict(GATE=gate, L=L, BD=BD, BV=BV, num_warps=8, num_stages=1, maxnreg=255)


class LinearAttention(Function):
    @staticmethod
    def forward(ctx, q, k, v, g, initial, runs, scale):
        (B, T, H, V), (G, D) = v.shape, q.shape[2:]
        wide = torch.promote_types(v.dtype, torch.float32)
        if on_triton(v):
            q, k, v, g, initial = (None if x is None else x.contiguous() for x in (q, k, v, g, initial))
            options = tiles(q, v, 0 if g is None else g.ndim - 2)
            L, BD, BV, levels = options["L"], options["BD"], options["BV"], options["L"].bit_length() - 1
            n, DB, VB = -(-T // L), -(-D // BD), -(-V // BV)
            o, final = torch.empty_like(v), v.new_empty(B, H, D, V, dtype=wide)
            borders = v.new_empty(B, H, n, D, V, dtype=wide)
            sizes = (T, n, H, G, D, V, VB)
            launch(
                states_kernel, (DB * VB, B * H), k, v, g, runs, initial, borders, final, scale, *sizes, BACK=False, **options
            )
            grid = (n * VB, B * H)
            launch(output_kernel, grid, q, k, v, g, runs, borders, o, scale, *sizes, DB, levels, **options)
        else:
            first = v.new_zeros(B, H, D, V, dtype=wide) if initial is None else initial.to(wide).contiguous()
            o, borders, final = torch.ops.rosetta.linear_attention(q, k, v, g, first, runs, scale)
            o = o.to(v.dtype)
        ctx.save_for_backward(q, k, v, g, initial, runs, borders)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx, do: Tensor | None, dfinal: Tensor | None):
        q, k, v, g, initial, runs, borders = ctx.saved_tensors
        (B, T, H, V), (G, D) = v.shape, q.shape[2:]
        wide = torch.promote_types(v.dtype, torch.float32)
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        if on_triton(v):
            options = tiles(q, v, 0 if g is None else g.ndim - 2)
            L, BD, BV, levels = options["L"], options["BD"], options["BV"], options["L"].bit_length() - 1
            n, DB, VB = -(-T // L), -(-D // BD), -(-V // BV)
            dq, dk = (v.new_empty(B, T, H, D, dtype=q.dtype if G == H else wide) for _ in range(2))
            dv, dg = torch.empty_like(v), None if g is None else torch.empty_like(g, dtype=wide)
            dinitial = None if initial is None else v.new_empty(B, H, D, V, dtype=wide)
            dborders = torch.empty_like(borders)
            sizes = (T, n, H, G, D, V, VB)
            grid = (DB * VB, B * H)
            launch(states_kernel, grid, q, do, g, runs, dfinal, dborders, dinitial, ctx.scale, *sizes, BACK=True, **options)
            sizes = (ctx.scale, *sizes, DB, levels)
            launch(values_kernel, (n, B * H), q, k, v, g, runs, dborders, do, dv, dg, *sizes, **options)
            options["BD"] = min(BD, 16)  # else it takes more registers than there are
            sizes = (*sizes[:-2], -(-D // options["BD"]), levels)
            launch(backward_kernel, (n, B * H), q, k, v, g, runs, borders, dborders, do, dq, dk, dg, *sizes, **options)
            if G < H:
                dq, dk = (x.unflatten(2, (G, H // G)).sum(3) for x in (dq, dk))
        else:
            dfinal = v.new_zeros(B, H, D, V, dtype=wide) if dfinal is None else dfinal
            dq, dk, dv, dg, dinitial = torch.ops.rosetta.linear_attention_backward(
                do, dfinal, q, k, v, g, borders, runs, ctx.scale
            )
        dg, dinitial = (None if like is None else x.to(like.dtype) for x, like in ((dg, g), (dinitial, initial)))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg, dinitial, None, None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = scale S_t^T q_t and the final state of S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T.

    q and k (B, T, G, D), v (B, T, H, V) of one dtype, or v in float32; G divides H: heads in order share a q and k. g, the
    logarithm of the decay, at most 0, of any dtype: None, (H,), (B, T, H), or with G = H (B, T, H, D). scale None is
    D^-1/2. initial_state (B, H, D, V); documents (B, T), integers of which a run of equal ones is a document. Returns o
    (B, T, H, V) in the dtype of v and the final state (B, H, D, V) in float32 (float64 if v is). ValueError for an
    argument that does not fit.
    """
    require(v.ndim == 4 and v.is_floating_point(), "v", f"floating point (B, T, H, V), not {v.dtype} {tuple(v.shape)}")
    B, T, H, V = v.shape
    require(0 < V <= 256 and H > 0, "v", f"at least one head, of 1 to 256 numbers, not {(H, V)}")
    require(q.ndim == 4 and q.shape[:2] == (B, T), "q", f"({B}, {T}, G, D), not {tuple(q.shape)}")
    G, D = q.shape[2:]
    require(G > 0 and H % G == 0, "q", f"a number of heads that divides {H}, not {G}")
    require(0 < D <= 256, "q", f"heads of 1 to 256 numbers, not {D}")
    require(k.shape == q.shape, "k", f"the shape of q, {tuple(q.shape)}, not {tuple(k.shape)}")
    require(
        q.is_floating_point() and (q.dtype == v.dtype or (v.dtype == torch.float32 and q.dtype.itemsize == 2)),
        "q",
        f"not {q.dtype} with v {v.dtype}",
    )
    require(k.dtype == q.dtype, "k", f"the dtype of q, {q.dtype}, not {k.dtype}")
    if g is not None:
        shapes = [(H,), (B, T, H)] + [(B, T, H, D)] * (G == H)
        require(tuple(g.shape) in shapes, "g", f"one of {', '.join(map(str, shapes))}, not {tuple(g.shape)}")
        g = g.expand(B, T, H) if g.ndim == 1 else g
    if initial_state is not None:
        shape = (B, H, D, V)
        require(initial_state.shape == shape, "initial_state", f"{shape}, not {tuple(initial_state.shape)}")
    runs = None
    if documents is not None:
        require(documents.shape == (B, T), "documents", f"{(B, T)}, not {tuple(documents.shape)}")
        require(not documents.is_floating_point(), "documents", f"integers, not {documents.dtype}")
        if T > 0:
            borders = documents[:, 1:] != documents[:, :-1]
            runs = F.pad(borders.cumsum(1, dtype=torch.int32), (1, 0))
    return apply(LinearAttention, q, k, v, g, initial_state, runs, D**-0.5 if scale is None else float(scale))


def retention(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Retention (Sun et al. 2023, section 2.3): head h of H forgets 2^-(5 + h) of its state a time."""
    heads = torch.arange(v.shape[2], device=v.device, dtype=torch.float32)
    return linear_attention(q, k, v, torch.log1p(-torch.exp2(-5 - heads)), **options)


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, state: Tensor, **options) -> tuple[Tensor, Tensor]:
    """One time: q, k (B, G, D), v (B, H, V), g None, (H,), (B, H) or (B, H, D); returns o (B, H, V) and the next state."""
    require(v.ndim == 3, "v", f"(B, H, V), not {tuple(v.shape)}")
    g = g if g is None or g.ndim == 1 else g.unsqueeze(1)
    o, state = linear_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), g, initial_state=state, **options)
    return o.squeeze(1), state


def pytorch(q, k, v, g=None, *, scale=None, initial_state=None, documents=None):
    (B, T, H, V), (G, D) = v.shape, q.shape[2:]
    wide = torch.promote_types(v.dtype, torch.float32)
    scale = D**-0.5 if scale is None else scale
    a = torch.ones(B, T, H, D, dtype=wide) if g is None else g.to(wide).reshape(*g.shape, *(1,) * (g.ndim < 4)).exp()
    a = a.expand(B, T, H, D)
    q, k = (x.repeat_interleave(H // G, 2) for x in (q, k))
    S = v.new_zeros(B, H, D, V) if initial_state is None else initial_state.to(v.dtype)
    S = S + 0 * (k.sum() + v.sum() + a.sum()).to(v.dtype)
    outs = []
    for t in range(T):
        if documents is not None and t > 0:
            S = S * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        S = a[:, t].unsqueeze(-1).to(v.dtype) * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outs.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2) * scale)
    return torch.stack(outs, 1) if outs else v + 0 * (q.sum() + k.sum() + a.sum()).to(v.dtype), S.to(wide)


def inputs(draw: Draw) -> dict:
    B, T, H = draw.one_of(1, 2, 0), draw.one_of(1, 5, 17, 33, 0), draw.one_of(1, 2)
    D, V = draw.one_of(1, 8, 20), draw.one_of(1, 8, 20)
    shape = draw.one_of(None, (H,), (B, T, H), (B, T, H, D))
    G = H if shape is not None and len(shape) == 4 else draw.one_of(1, H)
    documents = None
    if draw.flag():
        documents = np.cumsum(draw.uniform(B, T) < draw.one_of(0.05, 0.3), 1).astype(np.int64) % draw.one_of(2, 1000)
    return dict(
        q=draw.normal(B, T, G, D),
        k=draw.normal(B, T, G, D),
        v=draw.normal(B, T, H, V),
        g=None if shape is None else -draw.uniform(*shape, high=draw.one_of(0.1, 1.0, 40.0)),
        scale=draw.one_of(None, 0.5),
        initial_state=draw.normal(B, H, D, V) if draw.flag() else None,
        documents=documents,
    )


def cost(q, k, v, g=None, **_) -> tuple[Cost, Cost]:
    (B, T, H, V), D, L = v.shape, q.shape[-1], 64
    per_channel = g is not None and g.ndim == 4
    products = L / 2 * (D * (1 + 5 * per_channel) + V)
    states = 2 * 4 * B * H * T / L * D * V
    return (
        Cost(2 * B * T * H * (products + 2 * D * V), bytes_of(q, k, v, v) + states),
        Cost(2 * B * T * H * (2.5 * products + 5 * D * V), 2 * bytes_of(q, k, v) + bytes_of(v) + 2 * states),
    )


def example(B: int, T: int, H: int, D: int, gate: tuple[int, ...] | None, **more) -> dict:
    heads = Shape((B, T, H, D))
    return dict(q=heads, k=heads, v=heads, g=gate and Shape(gate, sign=-1)) | more


SPEC = Spec(
    op=linear_attention,
    reference=reference,
    reference_backward=reference_backward,
    pytorch=pytorch,
    inputs=inputs,
    gradients=("q", "k", "v", "g", "initial_state"),
    cost=cost,
    gpu=(
        example(4, 4096, 16, 128, (4, 4096, 16), initial_state=Shape((4, 16, 128, 128)), documents=Shape((4, 4096), below=2)),
        example(4, 4096, 16, 128, (4, 4096, 16, 128)),
    ),
    cpu=(example(1, 1024, 8, 64, (8,)), example(1, 1024, 8, 64, (1, 1024, 8, 64))),
    wide=("g", "initial_state"),
)
