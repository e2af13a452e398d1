"""Root-mean-square normalisation, with the residual addition before it if one is given.

    h = x + residual                                      (h = x without a residual)
    r = 1 / sqrt(mean(h^2) + eps)
    y = h r (weight + offset)

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467), eq. 4. `offset` = 1 is the form whose
weights start at zero, as in Gemma (Gemma Team 2024, arXiv:2403.08295).

With N rows of C numbers of b bytes, and R = 1 with a residual, else 0:
    forward    4 N C FLOPs      (2 + 2 R) N C b bytes moved: h is read, y written; x, residual and h with a residual
    backward   8 N C FLOPs      (3 + R) N C b bytes moved: dy and h are read, dx is written; and the gradient of h
"""

import numpy as np
import torch
from torch import Tensor

from kernels.launch import INTERPRETED, Function, apply, launch, on_triton, programs, row_tiles, tl, triton
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

# N rows, C columns


def reference(x, weight=None, residual=None, *, eps=1e-6, offset=0.0):
    h = x if residual is None else x + residual
    r = 1 / np.sqrt((h**2).mean(-1, keepdims=True) + eps)
    y = h * r if weight is None else h * r * (weight + offset)
    return y if residual is None else (y, h)


def reference_backward(grads, x, weight=None, residual=None, *, eps=1e-6, offset=0.0):
    h = x if residual is None else x + residual
    r = 1 / np.sqrt((h**2).mean(-1, keepdims=True) + eps)
    dy = grads[0]
    g = dy if weight is None else dy * (weight + offset)
    dh = r * g - h * r**3 * (g * h).mean(-1, keepdims=True)  # r depends on every number of its row
    if residual is not None:
        dh = dh + grads[1]
    found = dict(x=dh)
    if weight is not None:
        found["weight"] = (dy * h * r).reshape(-1, h.shape[-1]).sum(0)
    if residual is not None:
        found["residual"] = dh
    return found


@triton.jit
def forward_kernel(
    x, residual, weight, y, h, rstd, N, C, eps, offset, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    """ROWS rows a program, in TILES blocks of columns; with more than one the second pass reads from the cache."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    squares = tl.zeros((ROWS, 1), tl.float32)
    values = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(TILES):
        columns = tile * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
        inside = (rows < N) & (columns < C)
        at = rows.to(tl.int64) * C + columns
        values = tl.load(x + at, inside, 0).to(tl.float32)
        if residual is not None:
            total = (values + tl.load(residual + at, inside, 0).to(tl.float32)).to(h.dtype.element_ty)
            tl.store(h + at, total, inside)
            values = total.to(tl.float32)
        squares += tl.sum(values * values, 1, keep_dims=True)
    r = tl.rsqrt(squares / C + eps)
    tl.store(rstd + rows, r, rows < N)
    for tile in range(TILES):
        columns = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (rows < N) & (columns < C)
        at = rows.to(tl.int64) * C + columns
        if TILES > 1:  # else the whole row is still in registers
            values = tl.load(h + at, inside, 0).to(tl.float32)
        out = values * r
        if weight is not None:
            out *= tl.load(weight + columns, columns < C, 0).to(tl.float32) + offset
        tl.store(y + at, out, inside)


@triton.jit
def backward_kernel(
    dy, dtotal, h, weight, rstd, dx, dweight, N, C, offset, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    """Each program goes through every so-many-th group of ROWS rows and keeps its own sum for the weight (TILES = 1)."""
    sums = tl.zeros((1, BLOCK), tl.float32)
    for group in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = group * ROWS + tl.arange(0, ROWS)[:, None]
        r = tl.load(rstd + rows, rows < N, 0)  # (ROWS, 1)
        dots = tl.zeros((ROWS, 1), tl.float32)
        values = tl.zeros((ROWS, BLOCK), tl.float32)
        g = values
        for tile in range(TILES):
            columns = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
            inside = (rows < N) & (columns < C)
            at = rows.to(tl.int64) * C + columns
            values = tl.load(h + at, inside, 0).to(tl.float32)
            g = tl.load(dy + at, inside, 0).to(tl.float32)
            if weight is not None:
                if TILES == 1:
                    sums += tl.sum(g * values * r, 0, keep_dims=True)
                g *= tl.load(weight + columns, columns < C, 0).to(tl.float32) + offset
            dots += tl.sum(g * values, 1, keep_dims=True)
        for tile in range(TILES):
            columns = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
            inside = (rows < N) & (columns < C)
            at = rows.to(tl.int64) * C + columns
            if TILES > 1:
                values = tl.load(h + at, inside, 0).to(tl.float32)
                g = tl.load(dy + at, inside, 0).to(tl.float32)
                if weight is not None:
                    g *= tl.load(weight + columns, columns < C, 0).to(tl.float32) + offset
            d = r * (g - values * (r * r * dots / C))
            if dtotal is not None:
                d += tl.load(dtotal + at, inside, 0).to(tl.float32)
            tl.store(dx + at, d, inside)
    if weight is not None:
        if TILES == 1:
            columns = tl.arange(0, BLOCK)[None, :]
            tl.store(dweight + tl.program_id(0) * C + columns, sums, columns < C)


@triton.jit
def weight_kernel(dy, h, rstd, dweight, N, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The weight's gradient where a row takes several tiles: a block of columns and a share of the rows a program."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((1, BLOCK), tl.float32)
    for group in range(tl.program_id(1), tl.cdiv(N, ROWS), tl.num_programs(1)):
        rows = group * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (rows < N) & (columns < C)
        at = rows.to(tl.int64) * C + columns
        g = tl.load(dy + at, inside, 0).to(tl.float32) * tl.load(h + at, inside, 0).to(tl.float32)
        sums += tl.sum(g * tl.load(rstd + rows, rows < N, 0), 0, keep_dims=True)
    tl.store(dweight + tl.program_id(1) * C + columns, sums, columns < C)


class RMSNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, offset: float):
        C = x.shape[-1]
        if on_triton(x):
            x = x.contiguous()
            h = x if residual is None else torch.empty_like(x)
            residual = None if residual is None else residual.contiguous()
            weight = None if weight is None else weight.contiguous()
            y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1] + (1,), dtype=torch.float32)
            tiles = row_tiles(C, 16384)
            grid = (-(-rstd.numel() // tiles["ROWS"]),)
            launch(forward_kernel, grid, x, residual, weight, y, h, rstd, rstd.numel(), C, eps, offset, **tiles)
        else:
            h = x if residual is None else x + residual
            wide = torch.promote_types(h.dtype, torch.float32)
            rstd = (torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=wide).square_() / C).add_(eps).rsqrt_()
            y = h.to(wide) * rstd  # a product of unlike dtypes would be several times slower
            y = (y if weight is None else y.mul_(weight.to(wide) + offset)).to(h.dtype)
        ctx.save_for_backward(h, weight, rstd)
        ctx.offset, ctx.adds = offset, residual is not None
        return (y, h) if ctx.adds else y

    @staticmethod
    def backward(ctx, dy: Tensor, dtotal: Tensor | None = None):
        h, weight, rstd = ctx.saved_tensors
        N, C = rstd.numel(), h.shape[-1]
        dweight = None
        if on_triton(h):
            dy, dx = dy.contiguous(), torch.empty_like(h)
            dtotal = None if dtotal is None else dtotal.contiguous()
            tiles = row_tiles(C, 8192)
            shares = max(1, min(programs(h.device), -(-N // tiles["ROWS"])))
            if weight is not None:
                dweight = h.new_empty(shares, C, dtype=torch.float32)
            launch(backward_kernel, (shares,), dy, dtotal, h, weight, rstd, dx, dweight, N, C, ctx.offset, **tiles)
            if weight is not None:
                if tiles["TILES"] > 1:
                    rows, block = (4, 32) if INTERPRETED else (16, 256)
                    launch(weight_kernel, (-(-C // block), shares), dy, h, rstd, dweight, N, C, ROWS=rows, BLOCK=block)
                dweight = dweight.sum(0).to(weight.dtype)
        else:
            g, wide = dy.to(rstd.dtype), h.to(rstd.dtype)
            if weight is not None:
                dweight = (wide * rstd).mul_(g).reshape(N, C).sum(0).to(weight.dtype)
                g = g * (weight.to(rstd.dtype) + ctx.offset)
            mean = torch.linalg.vecdot(g, wide).unsqueeze(-1) / C
            dx = torch.addcmul(g, wide, mean * rstd.square(), value=-1).mul_(rstd)
            dx = (dx if dtotal is None else dx.add_(dtotal)).to(h.dtype)
        return dx, dweight, dx if ctx.adds else None, None, None


def rms_norm(
    x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None, *, eps: float = 1e-6, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """y = h / sqrt(mean(h^2) + eps) * (weight + offset) over the last axis, with h = x + residual.

    x (…, C) and residual of the same shape and dtype; weight (C,), of any dtype. Returns y (…, C) in the dtype of x;
    with a residual (y, h). Rows of up to 65536 numbers. ValueError for an argument that does not fit.
    """
    require(x.ndim > 0 and x.is_floating_point(), "x", f"floating point of at least one axis, not {x.dtype} {tuple(x.shape)}")
    C = x.shape[-1]
    require(0 < C <= 65536, "x", f"rows of 1 to 65536 numbers, not {C}")
    if weight is not None:
        require(weight.shape == (C,), "weight", f"one number a column, ({C},), not {tuple(weight.shape)}")
    if residual is not None:
        require(residual.shape == x.shape, "residual", f"the shape of x, {tuple(x.shape)}, not {tuple(residual.shape)}")
        require(residual.dtype == x.dtype, "residual", f"the dtype of x, {x.dtype}, not {residual.dtype}")
    require(eps >= 0, "eps", f"at least 0, not {eps}")
    return apply(RMSNorm, x, weight, residual, eps, offset)


def pytorch(x, weight=None, residual=None, *, eps=1e-6, offset=0.0):
    h = x if residual is None else x + residual
    y = torch.nn.functional.rms_norm(h, h.shape[-1:], None if weight is None else weight + offset, eps)
    return y if residual is None else (y, h)


def inputs(draw: Draw) -> dict:
    shape = draw.one_of((), (0,), (1,), (3,), (2, 5), (17,)) + (draw.one_of(1, 2, 7, 64, 100, 257),)
    return dict(
        x=draw.normal(*shape, scale=draw.one_of(1.0, 1e-3, 30.0)),
        weight=draw.normal(shape[-1]) if draw.flag() else None,
        residual=draw.normal(*shape) if draw.flag() else None,
        eps=draw.one_of(1e-6, 1e-2),
        offset=draw.one_of(0.0, 1.0),
    )


def cost(x, weight=None, residual=None, **_) -> tuple[Cost, Cost]:
    once = bytes_of(x)
    more = 0 if residual is None else 1
    return Cost(4 * x.numel(), (2 + 2 * more) * once), Cost(8 * x.numel(), (3 + more) * once)


SPEC = Spec(
    op=rms_norm,
    reference=reference,
    reference_backward=reference_backward,
    pytorch=pytorch,
    inputs=inputs,
    gradients=("x", "weight", "residual"),
    cost=cost,
    gpu=(
        dict(x=Shape((16384, 4096)), weight=Shape((4096,))),
        dict(x=Shape((16384, 4096)), weight=Shape((4096,)), residual=Shape((16384, 4096))),
        dict(x=Shape((1 << 20, 128))),
        dict(x=Shape((1024, 65536)), weight=Shape((65536,))),
    ),
    cpu=(dict(x=Shape((4096, 256)), weight=Shape((256,))), dict(x=Shape((4096, 4, 64)))),
)
