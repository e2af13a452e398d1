"""Layer normalisation.

    m = mean(x),  r = 1 / sqrt(mean((x - m)^2) + eps)
    y = (x - m) r weight + bias

Ba, Kiros and Hinton 2016, "Layer Normalization" (arXiv:1607.06450), eq. 4. Either of weight and bias can be absent.

With N rows of C numbers of b bytes:
    forward    8 N C FLOPs      2 N C b bytes moved: x is read, y written
    backward  14 N C FLOPs      3 N C b bytes moved: dy and x are read, dx is written
"""

import numpy as np
import torch
from torch import Tensor

from kernels.launch import INTERPRETED, Function, apply, launch, on_triton, programs, row_tiles, tl, triton
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

# N rows, C columns


def reference(x, weight=None, bias=None, *, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def reference_backward(grads, x, weight=None, bias=None, *, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    r = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    normed, dy = centred * r, grads[0]
    g = dy if weight is None else dy * weight
    # m and r depend on every number of the row: dx has no part along the ones, and almost none along x
    found = dict(x=r * (g - g.mean(-1, keepdims=True) - normed * (g * normed).mean(-1, keepdims=True)))
    if weight is not None:
        found["weight"] = (dy * normed).reshape(-1, x.shape[-1]).sum(0)
    if bias is not None:
        found["bias"] = dy.reshape(-1, x.shape[-1]).sum(0)
    return found


@triton.jit
def forward_kernel(x, weight, bias, y, mean, rstd, N, C, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """ROWS rows a program, in TILES blocks of columns; with more than one the second pass reads from the cache.

    Mean and squared deviations of a tile are exact for it and joined to those of the tiles before (Chan, Golub and
    LeVeque 1983), so that a mean far from zero costs no digits.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    m = tl.zeros((ROWS, 1), tl.float32)
    squares = tl.zeros((ROWS, 1), tl.float32)
    values = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(TILES):
        columns = tile * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
        inside = (rows < N) & (columns < C)
        values = tl.load(x + rows.to(tl.int64) * C + columns, inside, 0).to(tl.float32)
        before = tile * BLOCK
        count = tl.minimum(BLOCK, C - before)
        own = tl.sum(values, 1, keep_dims=True) / count
        centred = tl.where(columns < C, values - own, 0)
        step = (own - m) * (count / (before + count))
        squares += tl.sum(centred * centred, 1, keep_dims=True) + (own - m) * step * before
        m += step
    r = tl.rsqrt(squares / C + eps)
    tl.store(mean + rows, m, rows < N)
    tl.store(rstd + rows, r, rows < N)
    for tile in range(TILES):
        columns = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (rows < N) & (columns < C)
        at = rows.to(tl.int64) * C + columns
        if TILES > 1:  # else the whole row is still in registers
            values = tl.load(x + at, inside, 0).to(tl.float32)
        out = (values - m) * r
        if weight is not None:
            out *= tl.load(weight + columns, columns < C, 0).to(tl.float32)
        if bias is not None:
            out += tl.load(bias + columns, columns < C, 0).to(tl.float32)
        tl.store(y + at, out, inside)


@triton.jit
def backward_kernel(
    dy, x, weight, mean, rstd, dx, dweight, dbias, N, C, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    """Each program goes through every so-many-th group of ROWS rows and keeps its own sums for weight and bias (TILES = 1)."""
    weights = tl.zeros((1, BLOCK), tl.float32)
    biases = tl.zeros((1, BLOCK), tl.float32)
    for group in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = group * ROWS + tl.arange(0, ROWS)[:, None]
        m = tl.load(mean + rows, rows < N, 0)  # (ROWS, 1)
        r = tl.load(rstd + rows, rows < N, 0)
        total = tl.zeros((ROWS, 1), tl.float32)
        dots = tl.zeros((ROWS, 1), tl.float32)
        normed = tl.zeros((ROWS, BLOCK), tl.float32)
        g = normed
        for tile in range(TILES):
            columns = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
            inside = (rows < N) & (columns < C)
            at = rows.to(tl.int64) * C + columns
            normed = (tl.load(x + at, inside, 0).to(tl.float32) - m) * r
            g = tl.load(dy + at, inside, 0).to(tl.float32)
            if TILES == 1:
                if dweight is not None:
                    weights += tl.sum(g * normed, 0, keep_dims=True)
                if dbias is not None:
                    biases += tl.sum(g, 0, keep_dims=True)
            if weight is not None:
                g *= tl.load(weight + columns, columns < C, 0).to(tl.float32)
            total += tl.sum(g, 1, keep_dims=True)
            dots += tl.sum(g * normed, 1, keep_dims=True)
        for tile in range(TILES):
            columns = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
            inside = (rows < N) & (columns < C)
            at = rows.to(tl.int64) * C + columns
            if TILES > 1:
                normed = (tl.load(x + at, inside, 0).to(tl.float32) - m) * r
                g = tl.load(dy + at, inside, 0).to(tl.float32)
                if weight is not None:
                    g *= tl.load(weight + columns, columns < C, 0).to(tl.float32)
            tl.store(dx + at, r * (g - total / C - normed * (dots / C)), inside)
    if TILES == 1:
        columns = tl.arange(0, BLOCK)[None, :]
        at = tl.program_id(0) * C + columns
        if dweight is not None:
            tl.store(dweight + at, weights, columns < C)
        if dbias is not None:
            tl.store(dbias + at, biases, columns < C)


@triton.jit
def parameters_kernel(dy, x, mean, rstd, dweight, dbias, N, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of weight and bias where a row takes several tiles: a block of columns and a share of the rows a program."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    weights = tl.zeros((1, BLOCK), tl.float32)
    biases = tl.zeros((1, BLOCK), tl.float32)
    for group in range(tl.program_id(1), tl.cdiv(N, ROWS), tl.num_programs(1)):
        rows = group * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (rows < N) & (columns < C)
        at = rows.to(tl.int64) * C + columns
        g = tl.load(dy + at, inside, 0).to(tl.float32)
        if dweight is not None:
            m = tl.load(mean + rows, rows < N, 0)
            r = tl.load(rstd + rows, rows < N, 0)
            weights += tl.sum(g * ((tl.load(x + at, inside, 0).to(tl.float32) - m) * r), 0, keep_dims=True)
        if dbias is not None:
            biases += tl.sum(g, 0, keep_dims=True)
    at = tl.program_id(1) * C + columns
    if dweight is not None:
        tl.store(dweight + at, weights, columns < C)
    if dbias is not None:
        tl.store(dbias + at, biases, columns < C)


class LayerNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        C = x.shape[-1]
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        if on_triton(x):
            x = x.contiguous()
            weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
            y, mean = torch.empty_like(x), x.new_empty(x.shape[:-1] + (1,), dtype=torch.float32)
            rstd = torch.empty_like(mean)
            tiles = row_tiles(C, 16384)
            grid = (-(-mean.numel() // tiles["ROWS"]),)
            launch(forward_kernel, grid, x, weight, bias, y, mean, rstd, mean.numel(), C, eps, **tiles)
        else:
            # PyTorch's own: with float32 parameters it keeps mean and rstd in float32 on a CPU too, and on a GPU it always does
            wide = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
            if weight is None and wide != x.dtype:
                weight = x.new_ones(C, dtype=wide)
            weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
            y, mean, rstd = torch.ops.aten.native_layer_norm(x, [C], weight, bias, eps)
            y = y.to(x.dtype)  # autocast on a GPU gives float32
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        N, C = mean.numel(), x.shape[-1]
        if on_triton(x):
            dy, dx = dy.contiguous(), torch.empty_like(x)
            tiles = row_tiles(C, 8192)
            shares = max(1, min(programs(x.device), -(-N // tiles["ROWS"])))
            sums = [None if d is None else x.new_empty(shares, C, dtype=torch.float32) for d in ctx.dtypes]
            launch(backward_kernel, (shares,), dy, x, weight, mean, rstd, dx, *sums, N, C, **tiles)
            if tiles["TILES"] > 1 and any(ctx.dtypes):
                rows, block = (4, 32) if INTERPRETED else (16, 256)
                grid = (-(-C // block), shares)
                launch(parameters_kernel, grid, dy, x, mean, rstd, *sums, N, C, ROWS=rows, BLOCK=block)
            sums = [None if s is None else s.sum(0) for s in sums]
        else:
            wanted = [True, *(d is not None for d in ctx.dtypes)]
            # on a CPU PyTorch adds up the parameters' gradients in the dtype of x: float32 keeps their digits
            exact = weight.dtype if weight is not None and any(wanted[1:]) else x.dtype
            dx, *sums = torch.ops.aten.native_layer_norm_backward(
                dy.to(exact), x.to(exact), [C], mean, rstd, weight, bias, wanted
            )
            dx = dx.to(x.dtype)
        return dx, *(None if d is None else s.to(d) for s, d in zip(sums, ctx.dtypes, strict=True)), None


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis; var divides by the length of a row.

    x (…, C); weight and bias (C,), of any floating dtype. Returns y (…, C) in the dtype of x. Rows of up to 65536
    numbers. ValueError for an argument that does not fit.
    """
    require(x.ndim > 0 and x.is_floating_point(), "x", f"floating point of at least one axis, not {x.dtype} {tuple(x.shape)}")
    C = x.shape[-1]
    require(0 < C <= 65536, "x", f"rows of 1 to 65536 numbers, not {C}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            require(p.shape == (C,), name, f"one number a column, ({C},), not {tuple(p.shape)}")
            require(p.is_floating_point(), name, f"floating point, not {p.dtype}")
    require(eps >= 0, "eps", f"at least 0, not {eps}")
    return apply(LayerNorm, x, weight, bias, eps)


def pytorch(x, weight=None, bias=None, *, eps=1e-5):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def inputs(draw: Draw) -> dict:
    shape = draw.one_of((), (0,), (1,), (3,), (2, 5), (17,)) + (draw.one_of(1, 2, 7, 32, 64, 65, 100),)
    return dict(
        x=draw.normal(*shape, scale=draw.one_of(1.0, 1e-3, 30.0)) + draw.one_of(0.0, 10.0),
        weight=draw.normal(shape[-1]) if draw.flag() else None,
        bias=draw.normal(shape[-1]) if draw.flag() else None,
        eps=draw.one_of(1e-5, 1e-2),
    )


def cost(x, weight=None, bias=None, **_) -> tuple[Cost, Cost]:
    return Cost(8 * x.numel(), 2 * bytes_of(x)), Cost(14 * x.numel(), 3 * bytes_of(x))


SPEC = Spec(
    op=layer_norm,
    reference=reference,
    reference_backward=reference_backward,
    pytorch=pytorch,
    inputs=inputs,
    gradients=("x", "weight", "bias"),
    cost=cost,
    gpu=(
        dict(x=Shape((16384, 4096)), weight=Shape((4096,)), bias=Shape((4096,))),
        dict(x=Shape((1 << 20, 128))),
        dict(x=Shape((1024, 65536)), weight=Shape((65536,)), bias=Shape((65536,))),
    ),
    cpu=(dict(x=Shape((4096, 256)), weight=Shape((256,)), bias=Shape((256,))),),
)
