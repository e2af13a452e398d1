"""Many matrices, each times its own rows: the product of a mixture of experts, whose tokens stand sorted by expert.

    y[scatter[m] // fan_in] += scale[m] W_e x[gather[m] // fan_out]      for the rows m of group e, ends[e-1] <= m < ends[e]

Groups are ragged and may be empty; rows from the last end on belong to none, and give 0. `gather` reads tokens where they
stand (each for `fan_out` experts), `scatter` brings what the experts say back (`fan_in` of them for each token), and `scale`
is the gate. Nothing is padded and nothing is dropped: Gale et al. 2022, "MegaBlocks: Efficient Sparse Training with
Mixture-of-Experts" (arXiv:2211.15841); gather and scatter in the product: Tan et al. 2024, "Scattered Mixture-of-Experts
Implementation" (arXiv:2403.08245). Products of int8 are summed in int32 exactly. The path of PyTorch operations is in
group_products.py.

With M rows, K numbers in, N out, G groups, b bytes a number:
    forward    2 M K N FLOPs      (M K / fan_out + G K N + M N / fan_in) b bytes moved
    backward   4 M K N FLOPs      2 (M K / fan_out + G K N) b + M N b / fan_in bytes: dy is read too
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.group_products import added, dealt, gated, gated_backward, products, products_backward
from kernels.launch import INTERPRETED, Function, apply, dot, launch, narrow, on_triton, tl, triton
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

# M rows, K numbers of a row of x, N numbers of a row of y, G groups


def reference(x, weight, ends, *, gather=None, fan_out=1, scatter=None, fan_in=1, scale=None):
    M = len(x) if gather is None else len(gather)
    y = np.zeros((M // fan_in, weight.shape[1]))
    for m in range(ends[-1] if len(ends) else 0):
        e = np.searchsorted(ends, m, side="right")
        row = weight[e] @ x[m if gather is None else gather[m] // fan_out]
        y[m if scatter is None else scatter[m] // fan_in] += row * (1 if scale is None else scale[m])
    return y


def reference_backward(grads, x, weight, ends, *, gather=None, fan_out=1, scatter=None, fan_in=1, scale=None):
    dx, dweight, dscale = np.zeros(x.shape), np.zeros(weight.shape), np.zeros(0 if scale is None else len(scale))
    for m in range(ends[-1] if len(ends) else 0):
        e = np.searchsorted(ends, m, side="right")
        token = m if gather is None else gather[m] // fan_out
        dy = grads[0][m if scatter is None else scatter[m] // fan_in]
        factor = 1 if scale is None else scale[m]
        dx[token] += factor * dy @ weight[e]
        dweight[e] += factor * np.outer(dy, x[token])
        if scale is not None:
            dscale[m] = dy @ weight[e] @ x[token]
    return dict(x=dx, weight=dweight) | (dict(scale=dscale) if scale is not None else {})


@triton.jit(do_not_specialize=["groups", "tiles"])  # which change from call to call
def rows_kernel(
    x, weight, y, gather, scatter, scale, tile_group, tile_start, ends, K, N, fan_out, groups, tiles,
    stride_g, stride_n, stride_k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows of one group by COLUMNS a program. BAND tiles go through the columns together, so that the
    weights they share come from the cache."""
    columns = tl.cdiv(N, COLUMNS)
    band = tl.program_id(0) // (BAND * columns)
    size = min(tiles - band * BAND, BAND)
    inside = tl.program_id(0) % (BAND * columns)
    tile = band * BAND + inside % size
    n = inside // size * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.load(tile_group + tile)
    if group < groups:
        m = tl.load(tile_start + tile) + tl.arange(0, ROWS)
        here = m < tl.load(ends + group)
        source, target = m, m
        if gather is not None:
            source = tl.load(gather + m, here, 0) // fan_out
        if scatter is not None:
            target = tl.load(scatter + m, here, 0)
        matrix = weight + group * stride_g + n[None, :].to(tl.int64) * stride_n
        rows = x + source[:, None].to(tl.int64) * K
        if x.dtype.element_ty == tl.int8:
            total = tl.zeros((ROWS, COLUMNS), tl.int32)
        else:
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, K, DEPTH):
            k = start + tl.arange(0, DEPTH)
            left = tl.load(rows + k[None, :], here[:, None] & (k[None, :] < K), 0)  # (ROWS, DEPTH)
            right = tl.load(matrix + k[:, None] * stride_k, (k[:, None] < K) & (n[None, :] < N), 0)  # (DEPTH, COLUMNS)
            if x.dtype.element_ty == tl.int8:
                total = tl.dot(left, right, total, out_dtype=tl.int32)
            else:
                total = dot(left, right, total)
        if scale is not None:
            total = total.to(tl.float32) * tl.load(scale + m, here, 0).to(tl.float32)[:, None]
        at = target[:, None].to(tl.int64) * N + n[None, :]
        tl.store(y + at, narrow(total, y.dtype.element_ty), here[:, None] & (n[None, :] < N))


@triton.jit
def weights_kernel(
    x, dy, dweight, gather, scatter, scale, ends, K, N, fan_out, fan_in,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dW_e = sum over the rows of group e of scale dy x^T: a block of COLUMNS outputs by DEPTH inputs a program."""
    group = tl.program_id(2)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    begin, end = tl.load(ends + group - 1, group > 0, 0), tl.load(ends + group)
    total = tl.zeros((COLUMNS, DEPTH), tl.float32)
    for start in range(begin, end, ROWS):
        m = start + tl.arange(0, ROWS)
        source, target = m, m
        if gather is not None:
            source = tl.load(gather + m, m < end, 0) // fan_out
        if scatter is not None:
            target = tl.load(scatter + m, m < end, 0) // fan_in
        at = target[None, :].to(tl.int64) * N + n[:, None]
        left = tl.load(dy + at, (m[None, :] < end) & (n[:, None] < N), 0)  # (COLUMNS, ROWS)
        if scale is not None:
            factor = tl.load(scale + m, m < end, 0).to(tl.float32)[None, :]
            left = narrow(left.to(tl.float32) * factor, dy.dtype.element_ty)
        right = tl.load(x + source[:, None].to(tl.int64) * K + k[None, :], (m[:, None] < end) & (k[None, :] < K), 0)
        total = dot(left, right, total)
    at = group.to(tl.int64) * N * K + n[:, None].to(tl.int64) * K + k[None, :]
    tl.store(dweight + at, narrow(total, dweight.dtype.element_ty), (n[:, None] < N) & (k[None, :] < K))


def tiles_of(ends: Tensor, M: int, rows: int) -> tuple[int, Tensor, Tensor]:
    """How many tiles of `rows` rows suffice whatever the groups; the group of each (the number of groups: none), its first row.

    Worked out where `ends` is, so that the host waits for nothing.
    """
    tiles = M // rows + len(ends)
    begins = F.pad(ends[:-1], (1, 0))
    last = ((ends - begins + rows - 1) // rows).cumsum(0)  # tiles up to the end of each group
    number = torch.arange(tiles, device=ends.device)
    group = torch.searchsorted(last, number, right=True)
    known = group.clamp(max=len(ends) - 1)
    before = F.pad(last[:-1], (1, 0))[known]
    return tiles, group, begins[known] + (number - before) * rows


def times_weights(x, weight, ends, gather=None, fan_out=1, scatter=None, scale=None, dtype=None) -> Tensor:
    """The forward pass on Triton, in x's or another dtype; `weight` (G, N, K) may be of any strides."""
    M, (G, N, K) = len(x) if gather is None else len(gather), weight.shape
    dtype = dtype or (x.dtype if x.dtype != torch.int8 else torch.int32 if scale is None else torch.float32)
    y = torch.zeros(M, N, dtype=dtype, device=x.device)
    if 0 in (M, N, K, G):
        return y
    if INTERPRETED:
        rows, columns, depth, options = 16, 32, 32, {}
    elif x.dtype == torch.float32:
        rows, columns, depth, options = 64, 64, 16, dict(num_warps=8, num_stages=3)
    else:
        rows = 128 if M >= 64 * G else 16
        columns, depth, options = 128, 64, dict(num_warps=8 if rows == 128 else 4, num_stages=3)
    tiles, group, start = tiles_of(ends, M, rows)
    launch(
        rows_kernel, (tiles * -(-N // columns),), x, weight, y, gather, scatter, scale, group, start, ends, K, N, fan_out, G,
        tiles, *weight.stride(), ROWS=rows, COLUMNS=columns, DEPTH=depth, BAND=8, **options,
    )  # fmt: skip
    return y


def times_rows(x, dy, like, ends, gather=None, fan_out=1, scatter=None, fan_in=1, scale=None) -> Tensor:
    """The gradient of the weights on Triton, shaped as `like` (G, N, K)."""
    G, N, K = like.shape
    dweight = torch.empty_like(like, memory_format=torch.contiguous_format)
    if INTERPRETED:
        rows, columns, depth, options = 16, 32, 32, {}
    elif x.dtype == torch.float32:
        rows, columns, depth, options = 16, 64, 64, dict(num_warps=8, num_stages=3)
    else:
        rows, columns, depth, options = 64, 128, 128, dict(num_warps=8, num_stages=3)
    grid = (-(-N // columns), -(-K // depth), G)
    options = dict(ROWS=rows, COLUMNS=columns, DEPTH=depth, **options)
    launch(weights_kernel, grid, x, dy, dweight, gather, scatter, scale, ends, K, N, fan_out, fan_in, **options)
    return dweight


def fused(x: Tensor) -> bool:
    """Whether a product of x is Triton's: int8 goes where float16 would."""
    return on_triton(x if x.dtype != torch.int8 else x.new_empty(0, dtype=torch.float16))


class GroupedMatmul(Function):
    @staticmethod
    def forward(ctx, x, weight, ends, gather, fan_out: int, scatter, fan_in: int, scale):
        said = None  # what the rows give before the gate, which the gate's gradient needs
        if fused(x):
            y = times_weights(x.contiguous(), weight, ends, gather, fan_out, scatter, scale)
            y = y if fan_in == 1 else y.unflatten(0, (-1, fan_in)).sum(1, dtype=y.dtype)
        else:
            rows = dealt(x, gather, fan_out)
            if x.dtype == torch.int8:
                y = products(rows.double(), weight.double(), ends)  # exact: no sum reaches 2^53
                y = y.to(torch.int32) if scale is None else y.float()
            else:
                y = products(rows, weight, ends)
            if scale is None:
                y = added(y, scatter, fan_in)
            else:
                y, said = gated(y, scale, scatter, fan_in)
        ctx.save_for_backward(x, weight, ends, gather, scatter, scale, said)
        ctx.fans = fan_out, fan_in
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, ends, gather, scatter, scale, said = ctx.saved_tensors
        (fan_out, fan_in), (need_x, need_weight, *_, need_scale) = ctx.fans, ctx.needs_input_grad
        backward = gradients_on_triton if fused(x) else gradients
        drows, dweight, dscale = backward(
            dy.contiguous(), x, weight, ends, gather, fan_out, scatter, fan_in, scale, said, need_x, need_weight, need_scale
        )
        dx = None if drows is None else added(drows, gather, fan_out)
        return dx, dweight, None, None, None, None, None, dscale


def gradients(dy, x, weight, ends, gather, fan_out, scatter, fan_in, scale, said, need_x, need_weight, need_scale):
    """Of the rows (M, K) as they are multiplied, of weight and scale; None where it is not needed."""
    drows = dweight = dscale = None
    if scale is None:
        dy = dealt(dy, scatter, fan_in)
    else:
        dy, dscale = gated_backward(dy, said, scale, scatter, fan_in)
    if need_x or need_weight:
        drows, dweight = products_backward(dy, dealt(x, gather, fan_out), weight, ends, need_x, need_weight)
    return drows if need_x else None, dweight if need_weight else None, dscale if need_scale else None


def gradients_on_triton(dy, x, weight, ends, gather, fan_out, scatter, fan_in, scale, said, need_x, need_weight, need_scale):
    """The same; what reaches the rows is rounded once, after the gate."""
    drows = dweight = dscale = None
    if need_x or need_scale:
        drows = times_weights(dy, weight.mT, ends, scatter, fan_in, dtype=torch.float32 if need_scale else None)
    if need_scale:
        dscale = (drows * (x if gather is None else x.index_select(0, gather // fan_out))).sum(-1, dtype=scale.dtype)
    if need_x and scale is not None:
        drows = (drows * scale[:, None]).to(x.dtype)
    if need_weight:
        dweight = times_rows(x.contiguous(), dy, weight, ends, gather, fan_out, scatter, fan_in, scale)
    return drows, dweight, dscale


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    *,
    gather: Tensor | None = None,
    fan_out: int = 1,
    scatter: Tensor | None = None,
    fan_in: int = 1,
    scale: Tensor | None = None,
) -> Tensor:
    """Each group of rows times its own matrix: (M / fan_in, N).

    x: (M, K), or with `gather` (M / fan_out, K). weight: (G, N, K), as of a linear layer, of the dtype of x. ends: (G,) int64,
    not decreasing, at most M: where each group ends. gather: (M,) int64, a permutation: row m is x[gather[m] // fan_out].
    scatter: (M,) int64, a permutation: row m is added to row scatter[m] // fan_in of the result. scale: (M,), what row m is
    multiplied by. int8 gives int32, or float32 where there is a scale, and no gradients.
    ValueError for shapes and dtypes that do not fit, and on a CPU for ends that are out of order or of range.
    """
    M = len(x) if gather is None else len(gather)
    require(x.ndim == 2, "x", f"(M, K), not {tuple(x.shape)}")
    fits = weight.ndim == 3 and weight.shape[2] == x.shape[1] and weight.dtype == x.dtype
    require(fits, "weight", f"(G, N, {x.shape[1]}) of {x.dtype}, not {tuple(weight.shape)} of {weight.dtype}")
    require(len(weight) > 0, "weight", "at least one group, not 0")
    require(ends.shape == weight.shape[:1], "ends", f"an end for each of {len(weight)} groups, not {tuple(ends.shape)}")
    require(fan_out >= 1, "fan_out", f"at least 1, not {fan_out}")
    require(gather is not None or fan_out == 1, "fan_out", f"{fan_out} without a gather")
    require(M == len(x) * fan_out, "gather", f"{len(x) * fan_out} rows, {fan_out} for each of x, not {M}")
    require(fan_in >= 1 and M % fan_in == 0, "fan_in", f"{M} rows in sums of {fan_in}")
    require(scatter is not None or fan_in == 1, "fan_in", f"{fan_in} without a scatter")
    for name, given in (("gather", gather), ("scatter", scatter), ("scale", scale)):
        require(given is None or given.shape == (M,), name, f"({M},), not {given is not None and tuple(given.shape)}")
    if ends.device.type == "cpu" and len(ends) and not torch.compiler.is_compiling():
        right = ends[0] >= 0 and ends[-1] <= M and bool((ends[1:] >= ends[:-1]).all())
        require(right, "ends", f"rising from 0 to at most {M}, not {ends.tolist() if not right else ''}")
    gather, scatter, scale = (None if given is None else given.contiguous() for given in (gather, scatter, scale))
    return apply(GroupedMatmul, x, weight, ends.contiguous(), gather, fan_out, scatter, fan_in, scale)


def pytorch(x, weight, ends, *, gather=None, fan_out=1, scatter=None, fan_in=1, scale=None):
    rows, begin, parts = x if gather is None else x[gather // fan_out], 0, []
    for matrix, end in zip(weight, ends.tolist(), strict=True):
        parts.append(rows[begin:end] @ matrix.T)
        begin = end
    y = torch.cat([*parts, rows[begin:] @ weight.sum(0).T * 0])
    y = y if scale is None else (y * scale[:, None]).to(x.dtype)
    return y if scatter is None else torch.empty_like(y).index_copy(0, scatter, y).unflatten(0, (-1, fan_in)).sum(1)


def inputs(draw: Draw) -> dict:
    N, fan, G = draw.one_of(5, 0, 1, 16, 33), draw.one_of(2, 1, 3), draw.one_of(2, 1, 5, 8)
    gathered, scattered = draw.flag(), draw.flag()
    K, wide = draw.one_of(8, 1, 17, 40), draw.one_of(8, 1, 24, 70)
    M = N * fan
    ends = np.sort(draw.integers(G, high=M))
    if draw.flag():
        ends[-1] = M
    return dict(
        x=draw.normal(N if gathered else M, K),
        weight=draw.normal(G, wide, K),
        ends=ends,
        gather=draw.random.permutation(M) if gathered else None,
        fan_out=fan if gathered else 1,
        scatter=draw.random.permutation(M) if scattered else None,
        fan_in=draw.one_of(fan, 1) if scattered else 1,
        scale=draw.uniform(M) if draw.flag() else None,
    )


def cost(x, weight, ends, *, gather=None, fan_in=1, **_) -> tuple[Cost, Cost]:
    M, (_, N, K) = len(x) if gather is None else len(gather), weight.shape
    y = M // fan_in * N * x.element_size()
    once, flops = bytes_of(x, weight), 2 * M * N * K
    return Cost(flops, once + y), Cost(2 * flops, 2 * once + y)


def examples(tokens: int, groups: int, width: int, dim: int, top_k: int) -> tuple[dict, dict]:
    """Both products of an expert layer, of tokens evenly shared out."""
    M = tokens * top_k
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    ends = torch.arange(1, groups + 1) * M // groups
    up = dict(x=Shape((tokens, dim)), weight=Shape((groups, width, dim)), ends=ends, gather=order, fan_out=top_k)
    down = dict(
        x=Shape((M, width)), weight=Shape((groups, dim, width)), ends=ends, scatter=order, fan_in=top_k, scale=Shape((M,))
    )
    return up, down


SPEC = Spec(
    op=grouped_matmul,
    reference=reference,
    reference_backward=reference_backward,
    pytorch=pytorch,
    inputs=inputs,
    gradients=("x", "weight", "scale"),
    wide=("scale",),
    cost=cost,
    gpu=(*examples(16384, 8, 4096, 2048, 2), *examples(16384, 64, 1024, 2048, 8)),
    cpu=examples(2048, 8, 512, 256, 2),
)
