"""Rotary position embedding: each pair of coordinates of a query or key is turned by an angle that grows with its position.

    angle_ti = position_t frequency_i                     i = 0 … R/2 - 1
    y_j = x_j cos(angle_ti) - x_k sin(angle_ti)
    y_k = x_k cos(angle_ti) + x_j sin(angle_ti)           for the pair (j, k) = (i, i + R/2), or (2 i, 2 i + 1) if interleaved

Su et al. 2021, "RoFormer" (arXiv:2104.09864), eq. 34. Coordinates after the first R pass through. The gradient is
turned back: the same with -sin.

`angles` makes the tables of cos and sin, once for all layers of a call. It works out the angles in float64: as a float32
product, an angle at position 10^6 would be off by 0.03, and so would its cosine.

With n = B T H D numbers of b bytes, of which the share R/D is turned:
    forward and backward each   3 n R/D FLOPs      2 n b bytes moved, and the tables
"""

import numpy as np
import torch
from torch import Tensor

from kernels.launch import Function, apply, launch, on_triton, power_of_2, tl, triton
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

# B batch, T time, H heads, D head dim, R coordinates that are turned


def reference(x, cos, sin, *, interleaved=False):
    y, half = x.copy(), cos.shape[-1]
    for i in range(half):
        j, k = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = cos[..., i, None], sin[..., i, None]  # (…, T, 1), the same for all heads
        y[..., j] = x[..., j] * c - x[..., k] * s
        y[..., k] = x[..., k] * c + x[..., j] * s
    return y


def reference_backward(grads, x, cos, sin, *, interleaved=False):
    return dict(x=reference(grads[0], cos, -sin, interleaved=interleaved))


@triton.jit
def turn_kernel(
    x, cos, sin, y, rows_in_all, T, H, D, half, x_batch, x_time, x_head, table_batch,
    BACK: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """ROWS heads a program, those of one token beside each other; BLOCK >= R/2 pairs and REST >= D - R numbers of each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    exists = row < rows_in_all
    batch, time, head = (row // (T * H)).to(tl.int64), (row // H % T).to(tl.int64), row % H
    x += batch * x_batch + time * x_time + head * x_head
    y += row.to(tl.int64) * D
    pair = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    inside = exists & (pair < half)
    at = batch * table_batch + time * half + pair
    c = tl.load(cos + at, inside, 0).to(tl.float32)
    s = tl.load(sin + at, inside, 0).to(tl.float32)
    if BACK:
        s = -s
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        both = exists & (column < 2 * half)
        values = tl.load(x + column, both, 0).to(tl.float32)
        a, b = tl.split(tl.reshape(values, (ROWS, BLOCK, 2)))
        tl.store(y + column, tl.reshape(tl.join(a * c - b * s, b * c + a * s), (ROWS, 2 * BLOCK)), both)
    else:
        a = tl.load(x + pair, inside, 0).to(tl.float32)
        b = tl.load(x + half + pair, inside, 0).to(tl.float32)
        tl.store(y + pair, a * c - b * s, inside)
        tl.store(y + half + pair, b * c + a * s, inside)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)[None, :]
        rest = exists & (column < D)
        tl.store(y + column, tl.load(x + column, rest, 0), rest)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    """x (B, T, H, D) by the angles of cos and sin (T, R/2) or (B, T, R/2), or back by them."""
    (B, T, H, D), half = x.shape, cos.shape[-1]
    if on_triton(x):
        x = x if x.stride(-1) == 1 else x.contiguous()
        y = x.new_empty(x.shape)
        rows, block = B * T * H, power_of_2(half)
        tiles = dict(ROWS=max(1, 1024 // block), BLOCK=block, REST=0 if D == 2 * half else power_of_2(D - 2 * half))
        table_batch = T * half if cos.ndim == 3 else 0
        launch(
            turn_kernel, (-(-rows // tiles["ROWS"]),), x, cos.contiguous(), sin.contiguous(), y, rows, T, H, D, half,
            *x.stride()[:3], table_batch, BACK=back, INTERLEAVED=interleaved, **tiles,
        )  # fmt: skip
        return y
    wide = torch.promote_types(x.dtype, torch.float32)
    first = x[..., : 2 * half].to(wide)
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)  # (…, T, 1, R/2)
    if back:
        sin = -sin
    if interleaved:  # the pairs are complex numbers as they lie, and PyTorch multiplies those in one pass
        pairs = torch.view_as_complex(first.contiguous().unflatten(-1, (half, 2)))
        y = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    else:
        other = torch.cat((first[..., half:], first[..., :half]), -1)
        tables = torch.cat((-sin, sin), -1), torch.cat((cos, cos), -1)
        if B > 2 and cos.ndim == 3:  # written out for all heads, a whole (T, H, R) is one vector to PyTorch
            tables = (table.expand(T, H, 2 * half).contiguous() for table in tables)
        signed_sin, cos = tables
        y = other.mul_(signed_sin).addcmul_(first, cos)
    y = y.to(x.dtype)
    return y if D == 2 * half else torch.cat((y, x[..., 2 * half :]), -1)


class RoPE(Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return turned(x, cos, sin, interleaved, back=False)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return turned(dy, *ctx.saved_tensors, ctx.interleaved, back=True), None, None, None


def angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The tables for `rope`: cos and sin of positions times frequencies, each (…, T, R/2) in this dtype.

    positions (T,) or (B, T), numbers of tokens; frequencies (R/2,) in radians a position, in any floating dtype. The
    angles are float64 (float32 on devices without it). ValueError for an argument that does not fit.
    """
    require(positions.ndim in (1, 2), "positions", f"(T,) or (B, T), not {tuple(positions.shape)}")
    require(frequencies.ndim == 1 and frequencies.is_floating_point(), "frequencies",
            f"floating point (R/2,), not {frequencies.dtype} {tuple(frequencies.shape)}")  # fmt: skip
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    angle = positions.to(exact)[..., None] * frequencies.to(exact).to(positions.device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """x with its pairs of coordinates turned by the angles whose cosines and sines are given.

    x (B, T, H, D); cos and sin (T, R/2) or (B, T, R/2) with R <= D, as `angles` makes them, of any floating dtype: they
    count as constants and get no gradient. Pairs are (i, i + R/2), or neighbours if interleaved; coordinates from R on
    pass through. Returns (B, T, H, D) in the dtype of x. ValueError for an argument that does not fit.
    """
    require(x.ndim == 4 and x.is_floating_point(), "x", f"floating point (B, T, H, D), not {x.dtype} {tuple(x.shape)}")
    B, T, _, D = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.ndim in (2, 3) and table.shape[:-1] == (B, T)[3 - table.ndim :] and 0 < 2 * table.shape[-1] <= D
        require(fits, name, f"({T}, R/2) or ({B}, {T}, R/2) with 0 < R <= {D}, not {tuple(table.shape)}")
        require(table.is_floating_point() and not table.requires_grad, name, "constants of floating point, without a gradient")
    require(sin.shape == cos.shape, "sin", f"the shape of cos, {tuple(cos.shape)}, not {tuple(sin.shape)}")
    return apply(RoPE, x, cos, sin, interleaved)


def pytorch(x, cos, sin, *, interleaved=False):
    half = cos.shape[-1]
    first, rest = x[..., : 2 * half], x[..., 2 * half :]
    pair = (lambda a, b: torch.stack((a, b), -1).flatten(-2)) if interleaved else (lambda a, b: torch.cat((a, b), -1))
    a, b = (first[..., ::2], first[..., 1::2]) if interleaved else first.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * pair(cos, cos) + pair(-b, a) * pair(sin, sin), rest), -1).to(x.dtype)


def inputs(draw: Draw) -> dict:
    B, T, H = draw.one_of((1, 1, 1), (2, 0, 3), (2, 5, 4), (3, 17, 2), (1, 3, 1), (0, 4, 2))
    half = draw.one_of(1, 2, 3, 16, 33)
    angle = draw.uniform(*((B, T) if draw.flag() else (T,)), half, low=-7, high=7)
    return dict(
        x=draw.normal(B, T, H, 2 * half + draw.one_of(0, 0, 1, 20)),
        cos=np.cos(angle),
        sin=np.sin(angle),
        interleaved=draw.flag(),
    )


def cost(x, cos, sin, **_) -> tuple[Cost, Cost]:
    each = Cost(3 * x.numel() * 2 * cos.shape[-1] // x.shape[-1], 2 * bytes_of(x) + bytes_of(cos, sin))
    return each, each


SPEC = Spec(
    op=rope,
    reference=reference,
    reference_backward=reference_backward,
    pytorch=pytorch,
    inputs=inputs,
    gradients=("x",),
    cost=cost,
    gpu=(
        dict(x=Shape((4, 8192, 16, 128)), cos=Shape((8192, 64)), sin=Shape((8192, 64))),
        dict(x=Shape((4, 8192, 16, 128)), cos=Shape((8192, 64)), sin=Shape((8192, 64)), interleaved=True),
        dict(x=Shape((4, 8192, 16, 96)), cos=Shape((4, 8192, 16)), sin=Shape((4, 8192, 16))),
    ),
    cpu=(
        dict(x=Shape((16, 256, 4, 64)), cos=Shape((256, 32)), sin=Shape((256, 32))),
        dict(x=Shape((16, 256, 4, 64)), cos=Shape((256, 32)), sin=Shape((256, 32)), interleaved=True),
    ),
    wide=("cos", "sin"),
)
