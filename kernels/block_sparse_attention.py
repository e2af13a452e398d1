"""Softmax attention in which a mask of blocks says what is looked at: its cost is that of the blocks, not of T x S.

    s_ij = scale q_i . k_j            for blocks (i // block, j // block) of the mask, and j <= i if causal; else -inf
    y_i = sum_j softmax(s_i)_j v_j

Longformer: Beltagy et al. 2020 (arXiv:2004.05150), a window and global tokens; BigBird: Zaheer et al. 2020
(arXiv:2007.14062), a window, global and random blocks: `longformer_mask` and `bigbird_mask` make theirs. The tiles of
FlashAttention (Dao et al. 2022, arXiv:2205.14135, section 3.3) go along a list of the active blocks of their row.

With A active blocks of b x b, D and Dv wide, e bytes a number, over all heads:
    forward    2 (D + Dv) A b^2 FLOPs       (T D + A b (D + Dv) + T Dv) e bytes moved: q read, y written, k and v a block
    backward   (6 D + 4 Dv) A b^2 FLOPs     about three times as many bytes
"""

import numpy as np
import torch
from torch import Tensor

from kernels.launch import Function, apply, architecture, dot, launch, narrow, on_triton, power_of_2, tl, triton
from kernels.spec import Cost, Draw, Shape, Spec, require

LOG2E = tl.constexpr(1.4426950408889634)

# B batch, H query heads, K key/value heads, G = H / K, T queries, S keys, R blocks of queries, C blocks of keys


def longformer_mask(length: int, block: int, *, window: int, global_blocks: int = 0) -> Tensor:
    """(1, R, R) bool: blocks at most `window` blocks away; the first `global_blocks` see all and are seen by all."""
    require(window >= 0, "window", f"at least 0 blocks, not {window}")
    at = torch.arange(-(-length // block))
    near = (at[:, None] - at).abs() <= window
    return (near | (at[:, None] < global_blocks) | (at < global_blocks))[None]


def bigbird_mask(
    length: int, block: int, *, window: int = 1, global_blocks: int = 1, random_blocks: int = 3, heads: int = 1, seed: int = 0
) -> Tensor:
    """(heads, R, R) bool: Longformer's mask and, for each row of each head, `random_blocks` further blocks of its own."""
    require(random_blocks >= 0, "random_blocks", f"at least 0, not {random_blocks}")
    mask = longformer_mask(length, block, window=window, global_blocks=global_blocks).repeat(heads, 1, 1)
    drawn = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(mask, -1)
    chosen = drawn.topk(min(random_blocks, mask.shape[-1]), dim=-1).indices
    return mask.scatter(-1, chosen, True)


def probabilities(q, k, mask, block, causal, scale):
    """For the reference: p (B, H, T, S); rows that see nothing are zero."""
    (_, H, T, D), S = q.shape, k.shape[2]
    i, j = np.arange(T)[:, None], np.arange(S)
    seen = mask[:, i // block, j // block] if T and S else np.zeros((len(mask), T, S), bool)
    seen = seen & (j <= i + S - T) if causal else seen
    s = q @ np.repeat(k, H // k.shape[1], 1).swapaxes(2, 3) * (D**-0.5 if scale is None else scale)
    s = np.where(seen, s, -np.inf)
    highest = s.max(-1, initial=-np.inf, keepdims=True)
    e = np.exp(s - np.where(np.isinf(highest), 0, highest))
    return e / np.maximum(e.sum(-1, keepdims=True), np.finfo(float).tiny)


def reference(q, k, v, mask, *, block=64, causal=False, scale=None):
    return probabilities(q, k, mask, block, causal, scale) @ np.repeat(v, q.shape[1] // v.shape[1], 1)


def reference_backward(grads, q, k, v, mask, *, block=64, causal=False, scale=None):
    p = probabilities(q, k, mask, block, causal, scale)
    (B, H, _, D), K = q.shape, k.shape[1]
    dp = grads[0] @ np.repeat(v, H // K, 1).swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * (D**-0.5 if scale is None else scale)
    return dict(
        q=ds @ np.repeat(k, H // K, 1),
        k=(ds.swapaxes(2, 3) @ q).reshape(B, K, H // K, *k.shape[2:]).sum(2),
        v=(p.swapaxes(2, 3) @ grads[0]).reshape(B, K, H // K, *v.shape[2:]).sum(2),
    )


@triton.jit
def rows_of(x, head, first, count, D, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(BLOCK, WIDTH): rows first … first + BLOCK - 1 of a head's (count, D) matrix, zero beyond it."""
    rows, columns = first + tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    return tl.load(x + head.to(tl.int64) * count * D + rows * D + columns, (rows < count) & (columns < D), 0)


@triton.jit
def put_rows(x, values, head, first, count, D, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    rows, columns = first + tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    at = x + head.to(tl.int64) * count * D + rows * D + columns
    tl.store(at, values.to(x.dtype.element_ty), (rows < count) & (columns < D))


@triton.jit
def scores(q, k, row, column, T, S, factor, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK, BLOCK): logits in base 2 of a block of queries and one of keys; -inf where the query does not see the key."""
    i = row * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = column * BLOCK + tl.arange(0, BLOCK)[None, :]
    seen = (i < T) & (j < S)
    if CAUSAL:
        seen &= j <= i + S - T
    s = dot(q, tl.trans(k), tl.zeros((BLOCK, BLOCK), tl.float32)) * factor
    return tl.where(seen, s, -float("inf"))


@triton.jit
def forward_kernel(
    q, k, v, y, lse, columns, counts, H, G, T, S, D, DV, R, C, M, scale,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head a program, along the list of the blocks of keys that it looks at."""
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // G
    listed = (head % H % M) * R + row
    queries = rows_of(q, head, row * BLOCK, T, D, BLOCK, WIDTH)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    out = tl.zeros((BLOCK, WIDTH_V), tl.float32)
    for n in range(tl.load(counts + listed)):
        column = tl.load(columns + listed * C + n)
        keys = rows_of(k, kv_head, column * BLOCK, S, D, BLOCK, WIDTH)
        s = scores(queries, keys, row, column, T, S, scale * LOG2E, CAUSAL, BLOCK)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen yet
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        values = rows_of(v, kv_head, column * BLOCK, S, DV, BLOCK, WIDTH_V)
        out = dot(narrow(p, values.dtype), values, out * shrink[:, None])
        total = total * shrink + tl.sum(p, 1)
        top = higher
    put_rows(y, out / tl.where(total > 0, total, 1.0)[:, None], head, row * BLOCK, T, DV, BLOCK, WIDTH_V)
    rows = row * BLOCK + tl.arange(0, BLOCK)
    found = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))  # p = 0 where nothing is seen
    tl.store(lse + head.to(tl.int64) * T + rows, found, rows < T)


@triton.jit
def score_gradient(s, lse, delta, dy, values, BLOCK: tl.constexpr):
    """p and ds, both (BLOCK, BLOCK), from the logits."""
    p = tl.exp2(s - lse[:, None])
    dp = dot(dy, tl.trans(values), tl.zeros((BLOCK, BLOCK), tl.float32))
    return p, p * (dp - delta[:, None])


@triton.jit
def query_kernel(
    q, k, v, dy, lse, delta, dq, columns, counts, H, G, T, S, D, DV, R, C, M, scale,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries: the same way as in the forward pass."""
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // G
    listed = (head % H % M) * R + row
    rows = row * BLOCK + tl.arange(0, BLOCK)
    queries = rows_of(q, head, row * BLOCK, T, D, BLOCK, WIDTH)
    gradients = rows_of(dy, head, row * BLOCK, T, DV, BLOCK, WIDTH_V)
    sums = tl.load(lse + head.to(tl.int64) * T + rows, rows < T, 0)
    deltas = tl.load(delta + head.to(tl.int64) * T + rows, rows < T, 0)
    out = tl.zeros((BLOCK, WIDTH), tl.float32)
    for n in range(tl.load(counts + listed)):
        column = tl.load(columns + listed * C + n)
        keys = rows_of(k, kv_head, column * BLOCK, S, D, BLOCK, WIDTH)
        values = rows_of(v, kv_head, column * BLOCK, S, DV, BLOCK, WIDTH_V)
        s = scores(queries, keys, row, column, T, S, scale * LOG2E, CAUSAL, BLOCK)
        _, ds = score_gradient(s, sums, deltas, gradients, values, BLOCK)
        out = dot(narrow(ds, keys.dtype), keys, out)
    put_rows(dq, out * scale, head, row * BLOCK, T, D, BLOCK, WIDTH)


@triton.jit
def key_kernel(
    q, k, v, dy, lse, delta, dk, dv, rows_seen, counts, H, G, T, S, D, DV, R, C, M, scale,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys: along the lists of the blocks of queries that look at it, of each head that shares it."""
    column, kv_head = tl.program_id(0), tl.program_id(1)
    keys = rows_of(k, kv_head, column * BLOCK, S, D, BLOCK, WIDTH)
    values = rows_of(v, kv_head, column * BLOCK, S, DV, BLOCK, WIDTH_V)
    key_sum, value_sum = tl.zeros((BLOCK, WIDTH), tl.float32), tl.zeros((BLOCK, WIDTH_V), tl.float32)
    for g in range(G):
        head = kv_head * G + g
        listed = (head % H % M) * C + column
        for n in range(tl.load(counts + listed)):
            row = tl.load(rows_seen + listed * R + n)
            rows = row * BLOCK + tl.arange(0, BLOCK)
            queries = rows_of(q, head, row * BLOCK, T, D, BLOCK, WIDTH)
            gradients = rows_of(dy, head, row * BLOCK, T, DV, BLOCK, WIDTH_V)
            sums = tl.load(lse + head.to(tl.int64) * T + rows, rows < T, 0)
            deltas = tl.load(delta + head.to(tl.int64) * T + rows, rows < T, 0)
            s = scores(queries, keys, row, column, T, S, scale * LOG2E, CAUSAL, BLOCK)
            p, ds = score_gradient(s, sums, deltas, gradients, values, BLOCK)
            value_sum = dot(tl.trans(narrow(p, gradients.dtype)), gradients, value_sum)
            key_sum = dot(tl.trans(narrow(ds, queries.dtype)), queries, key_sum)
    put_rows(dk, key_sum * scale, kv_head, column * BLOCK, S, D, BLOCK, WIDTH)
    put_rows(dv, value_sum, kv_head, column * BLOCK, S, DV, BLOCK, WIDTH_V)


def lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of a mask (M, R, C): for each row its active columns first, (M, R, C) int32, and how many they are, (M, R) int32."""
    order = torch.argsort(mask.to(torch.int8), dim=-1, descending=True, stable=True)
    return order.to(torch.int32).contiguous(), mask.sum(-1, dtype=torch.int32).contiguous()


def tiled(q: Tensor, v: Tensor, mask: Tensor, block: int, causal: bool, T: int, S: int) -> tuple[Tensor, dict]:
    """The mask spelled out for the tiles of a program, which may be smaller than its blocks, and the kernels' constants.

    Tiles are what registers hold: 64 rows, 32 where rows are wide, 16 in float32, which has no tensor cores.
    """
    width, width_v = (max(16, power_of_2(x.shape[-1])) for x in (q, v))
    widest = max(width, width_v)
    tile = min(block, 16 if q.dtype == torch.float32 else 32 if widest > 128 else 64)
    finer = mask.repeat_interleave(block // tile, 1).repeat_interleave(block // tile, 2)
    warps, stages = (8, 1) if widest > 64 or q.dtype == torch.float32 else (4, 2)
    if architecture(q.device).startswith("gfx") and q.dtype != torch.float32:
        warps = 4  # of 64 threads
    options = dict(CAUSAL=causal, BLOCK=tile, WIDTH=width, WIDTH_V=width_v, num_warps=warps, num_stages=stages)
    return finer[:, : -(-T // tile), : -(-S // tile)], options


def row_blocks(mask: Tensor, T: int, S: int, block: int, G: int):
    """(heads, kv heads, queries, keys) for each block of queries, for all heads at once where they look at the same."""
    M, R, _ = mask.shape
    for m in range(M):
        heads, kv_heads = (slice(None), slice(None)) if M == 1 else (slice(m, m + 1), slice(m // G, m // G + 1))
        for row in range(R):
            columns = mask[m, row].nonzero()[:, 0]
            keys = (columns[:, None] * block + torch.arange(block, device=mask.device)).flatten()
            yield heads, kv_heads, slice(row * block, min((row + 1) * block, T)), keys[keys < S]


def block_probabilities(q: Tensor, k: Tensor, rows: slice, keys: Tensor, shift: int, causal: bool, scale: float) -> Tensor:
    """(B, K, G t, s) of a block of queries (B, K, G, t, D) and the keys (B, K, s, D) they look at."""
    B, K, G, t, D = q.shape
    s = q.reshape(B, K, G * t, D) @ k.mT
    s = s.to(torch.promote_types(s.dtype, torch.float32)).mul_(scale)
    if causal:
        i = torch.arange(rows.start, rows.stop, device=q.device).repeat(G)[:, None]
        s.masked_fill_(keys > i + shift, -torch.inf)
    return s.softmax(-1).nan_to_num_(0.0)  # of nothing but -inf: a row that sees nothing


@torch.library.custom_op("rosetta::block_sparse_attention", mutates_args=())
def forward_by_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int, causal: bool, scale: float) -> Tensor:
    """The PyTorch path: for a block of queries the keys are gathered and multiplied at once."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    q, y = q.reshape(B, K, H // K, T, D), q.new_zeros(B, H, T, v.shape[-1])
    for heads, kv_heads, rows, keys in row_blocks(mask, T, S, block, H // K):
        ys = y[:, heads, rows]
        qs = q[:, :, :, rows] if heads == slice(None) else q[:, kv_heads, heads.start % (H // K), None, rows]
        p = block_probabilities(qs, k[:, kv_heads, keys], rows, keys, S - T, causal, scale)
        ys.copy_((p.to(v.dtype) @ v[:, kv_heads, keys]).view(ys.shape))
    return y


@forward_by_rows.register_fake
def _(q, k, v, mask, block, causal, scale):
    return q.new_empty(*q.shape[:3], v.shape[-1])


@torch.library.custom_op("rosetta::block_sparse_attention_backward", mutates_args=())
def backward_by_rows(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    G, wide = H // K, torch.promote_types(q.dtype, torch.float32)
    queries, dq = q.reshape(B, K, G, T, D), torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for heads, kv_heads, rows, keys in row_blocks(mask, T, S, block, G):
        qs = queries[:, :, :, rows] if heads == slice(None) else queries[:, kv_heads, heads.start % G, None, rows]
        ks, vs = k[:, kv_heads, keys], v[:, kv_heads, keys]
        p = block_probabilities(qs, ks, rows, keys, S - T, causal, scale)
        flat, dys = qs.flatten(2, 3), dy[:, heads, rows].unflatten(1, (ks.shape[1], -1)).flatten(2, 3)
        dp = (dys @ vs.mT).to(wide)
        ds = ((dp - (p * dp).sum(-1, keepdim=True)).mul_(p) * scale).to(q.dtype)
        part = dq[:, heads, rows]
        part.copy_((ds @ ks).view(part.shape))
        dk[:, kv_heads].index_add_(2, keys, (ds.mT @ flat).to(wide))
        dv[:, kv_heads].index_add_(2, keys, (p.to(v.dtype).mT @ dys).to(wide))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@backward_by_rows.register_fake
def _(dy, q, k, v, mask, block, causal, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


class BlockSparseAttention(Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, block: int, causal: bool, scale: float) -> Tensor:
        ctx.options, lse, y = (block, causal, scale), None, None
        if on_triton(q):
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
            mask, options = tiled(q, v, mask, block, causal, T, S)
            M, R, C = mask.shape
            y, lse = q.new_empty(B, H, T, v.shape[-1]), q.new_empty(B, H, T, dtype=torch.float32)
            numbers = (H, H // K, T, S, D, v.shape[-1], R, C, M, scale)
            launch(forward_kernel, (R, B * H), q, k, v, y, lse, *lists(mask), *numbers, **options)
            ctx.kernel_options = options
        else:
            y = forward_by_rows(q, k, v, mask, block, causal, scale)
        ctx.save_for_backward(q, k, v, mask, y if lse is not None else None, lse)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v, mask, y, lse = ctx.saved_tensors
        block, causal, scale = ctx.options
        if lse is None:
            return *backward_by_rows(dy, q, k, v, mask, block, causal, scale), None, None, None, None
        (B, H, T, D), (K, S), (M, R, C) = q.shape, k.shape[1:3], mask.shape
        dy, delta = dy.contiguous(), (dy.float() * y.float()).sum(-1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        numbers, options = (H, H // K, T, S, D, v.shape[-1], R, C, M, scale), ctx.kernel_options
        launch(query_kernel, (R, B * H), q, k, v, dy, lse, delta, dq, *lists(mask), *numbers, **options)
        launch(key_kernel, (C, B * K), q, k, v, dy, lse, delta, dk, dv, *lists(mask.mT), *numbers, **options)
        return dq, dk, dv, None, None, None, None


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, block: int = 64, causal: bool = False, scale: float | None = None
) -> Tensor:
    """y (B, H, T, Dv) of q (B, H, T, D), k (B, K, S, D) and v (B, K, S, Dv), all of one dtype, K dividing H.

    mask (H or 1, ceil(T / block), ceil(S / block)) bool: which blocks of keys a block of queries looks at; block is 16,
    32, 64 or 128. With `causal` the T queries are the last of the S tokens and T = S or both multiples of block fit the
    mask; none sees a later key. A row that sees nothing gives 0. `scale` is 1 / sqrt(D) where None.
    ValueError for an argument that does not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        fits = x.ndim == 4 and x.is_floating_point() and x.dtype == q.dtype
        require(fits, name, f"floating point of four axes, and the dtype of q, not {x.dtype} {tuple(x.shape)}")
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    require(1 <= D <= 256, "q", f"head dims of 1 to 256, not {D}")
    fits = K > 0 and H % K == 0 and k.shape == (B, K, S, D)
    require(fits, "k", f"(B, K, S, D) with K dividing H, for q {tuple(q.shape)}, not {tuple(k.shape)}")
    fits = v.shape[:3] == k.shape[:3] and 1 <= v.shape[3] <= 256
    require(fits, "v", f"(B, K, S, Dv) with Dv of 1 to 256, for k {tuple(k.shape)}, not {tuple(v.shape)}")
    require(block in (16, 32, 64, 128), "block", f"16, 32, 64 or 128, not {block}")
    shape = (-(-T // block), -(-S // block))
    fits = mask.ndim == 3 and mask.dtype == torch.bool and mask.shape[0] in (1, H) and mask.shape[1:] == shape
    require(fits, "mask", f"bool (1 or {H}, {shape[0]}, {shape[1]}), not {mask.dtype} {tuple(mask.shape)}")
    require(not causal or T <= S, "causal", f"{T} queries cannot be the last of {S} tokens")
    require(scale is None or scale > 0, "scale", f"more than 0, not {scale}")
    return apply(BlockSparseAttention, q, k, v, mask, block, causal, D**-0.5 if scale is None else scale)


def pytorch(q, k, v, mask, *, block=64, causal=False, scale=None):
    (T, D), S, groups = q.shape[2:], k.shape[2], q.shape[1] // k.shape[1]
    seen = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :T, :S]
    if causal:
        seen = seen & torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = (q @ k.mT * (D**-0.5 if scale is None else scale)).masked_fill(~seen, torch.finfo(q.dtype).min)
    return (s.softmax(-1) * seen.any(-1, keepdim=True)) @ v


def inputs(draw: Draw) -> dict:
    B, K, G = draw.one_of(0, 1, 2), draw.integer(1, 2), draw.integer(1, 2)
    D, Dv, block = draw.one_of(3, 16, 20), draw.one_of(4, 16), draw.one_of(16, 64)
    T = draw.one_of(0, 2, 16, 37, 70)  # a single key has gradients that are zero but for rounding: a test of its own
    S = T + draw.one_of(0, 0, 16)
    heads = draw.one_of(1, K * G)
    return dict(
        q=draw.normal(B, K * G, T, D),
        k=draw.normal(B, K, S, D),
        v=draw.normal(B, K, S, Dv),
        mask=draw.uniform(heads, -(-T // block), -(-S // block)) < 0.6,
        block=block,
        causal=draw.flag(),
        scale=draw.one_of(None, 0.7),
    )


def cost(q, k, v, mask, *, block=64, **_) -> tuple[Cost, Cost]:
    (B, H, T, D), Dv = q.shape, v.shape[-1]
    active = int(mask.sum()) * (H // mask.shape[0]) * B
    pairs, moved = active * block**2, (B * H * T * (D + Dv) + active * block * (D + Dv)) * q.element_size()
    return Cost(2 * (D + Dv) * pairs, moved), Cost((6 * D + 4 * Dv) * pairs, 3 * moved)


def example(B: int, H: int, T: int, D: int, block: int) -> dict:
    return dict(**{x: Shape((B, H, T, D)) for x in "qkv"}, mask=bigbird_mask(T, block, heads=1), block=block)


SPEC = Spec(
    op=block_sparse_attention,
    reference=reference,
    reference_backward=reference_backward,
    pytorch=pytorch,
    inputs=inputs,
    gradients=("q", "k", "v"),
    cost=cost,
    gpu=(example(2, 16, 16384, 64, 64), example(2, 16, 16384, 128, 128)),
    cpu=(example(1, 4, 4096, 64, 64),),
)
