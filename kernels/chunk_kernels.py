"""The Triton path of kernels/linear_attention.py: states from chunk to chunk, then all chunks at once.

Forward: one kernel goes through a row's chunks in order and stores the state each begins with, one makes the outputs of
every chunk from that state and the pairs within. Backward: the first again, from the last chunk to the first, for the
gradients of those states; one kernel for the values and the pairs' share of a gate, one for queries, keys and the rest.
"""

import torch
from torch import Tensor

from kernels.launch import dot, launch, narrow, power_of_2, tl, triton

# B batch, T time, H heads, G groups of heads that share q and k, D key width, V value width, L times of a chunk, n chunks


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


def constants(q: Tensor, v: Tensor, gate: int) -> dict:
    """Constants of the kernels: smaller blocks where products are in float32 or many, which take more registers."""
    longest, widest = (32 if q.dtype == torch.float32 or gate == 2 else 64), (16 if gate == 2 else 32)
    L, BD, BV = (
        min(m, max(16, power_of_2(x))) for m, x in ((longest, q.shape[1]), (widest, q.shape[-1]), (widest, v.shape[-1]))
    )
    return dict(GATE=gate, L=L, BD=BD, BV=BV, num_warps=8, num_stages=1, maxnreg=255)


def triton_forward(q, k, v, g, initial, runs, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """o, the states that the chunks begin with, and the last state; all inputs contiguous."""
    (B, T, H, V), (G, D) = v.shape, q.shape[2:]
    options = constants(q, v, 0 if g is None else g.ndim - 2)
    n, DB, VB = (-(-size // options[block]) for size, block in ((T, "L"), (D, "BD"), (V, "BV")))
    o, final = torch.empty_like(v), v.new_empty(B, H, D, V, dtype=torch.float32)
    borders = v.new_empty(B, H, n, D, V, dtype=torch.float32)
    sizes = (T, n, H, G, D, V, VB)
    grid = (DB * VB, B * H)
    launch(states_kernel, grid, k, v, g, runs, initial, borders, final, scale, *sizes, BACK=False, **options)
    levels = options["L"].bit_length() - 1
    launch(output_kernel, (n * VB, B * H), q, k, v, g, runs, borders, o, scale, *sizes, DB, levels, **options)
    return o, borders, final


def triton_backward(do, dfinal, q, k, v, g, initial, borders, runs, scale: float):
    """Gradients of q, k, v, g and the initial state, None for those without; all inputs contiguous."""
    (B, T, H, V), (G, D) = v.shape, q.shape[2:]
    options = constants(q, v, 0 if g is None else g.ndim - 2)
    n, DB, VB = (-(-size // options[block]) for size, block in ((T, "L"), (D, "BD"), (V, "BV")))
    dq, dk = (v.new_empty(B, T, H, D, dtype=q.dtype if G == H else torch.float32) for _ in range(2))
    dv, dg = torch.empty_like(v), None if g is None else torch.empty_like(g, dtype=torch.float32)
    dinitial = None if initial is None else v.new_empty(B, H, D, V, dtype=torch.float32)
    dborders = torch.empty_like(borders)
    sizes, levels = (T, n, H, G, D, V, VB), options["L"].bit_length() - 1
    grid = (DB * VB, B * H)
    launch(states_kernel, grid, q, do, g, runs, dfinal, dborders, dinitial, scale, *sizes, BACK=True, **options)
    grid = (n, B * H)
    launch(values_kernel, grid, q, k, v, g, runs, dborders, do, dv, dg, scale, *sizes, DB, levels, **options)
    options["BD"] = min(options["BD"], 16)  # else it takes more registers than there are
    sizes = (scale, *sizes, -(-D // options["BD"]), levels)
    launch(backward_kernel, grid, q, k, v, g, runs, borders, dborders, do, dq, dk, dg, *sizes, **options)
    if G < H:
        dq, dk = (x.unflatten(2, (G, H // G)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dg, dinitial
