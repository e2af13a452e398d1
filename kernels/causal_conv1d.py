"""Causal depthwise convolution over time, with SiLU behind it if asked, and a state for decoding.

    p_t = bias + sum_{i < W} weight[:, W-1-i] x_{t-i}          (a number a channel; x before the start is the state, or 0)
    y_t = p_t,  or  p_t sigmoid(p_t)

The short convolution in front of a selective state space: Gu and Dao 2023, "Mamba" (arXiv:2312.00752), section 3.4. With
documents, runs of equal numbers, a tap that would reach into another run counts as 0; the state belongs to the first run,
and what is handed on as the final state to the last.

With B T C numbers of b bytes (SiLU counted as 4 FLOPs, its derivative as 8; p is computed again in the backward pass):
    forward    (2 W + 4) B T C FLOPs      2 B T C b bytes moved: x is read, y written
    backward   (6 W + 8) B T C FLOPs      3 B T C b bytes moved: x and dy are read, dx is written
"""

import numpy as np
import torch
from torch import Tensor

from kernels.launch import Function, apply, launch, on_triton, power_of_2, programs, tl, triton
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

# B batch, T time, C channels, W taps


def taps(x, initial_state, documents, W):
    """padded (B, W-1 + T, C): state and x in one row; seen[b, t, j]: whether the output at t sees padded number t + j."""
    B, T, C = x.shape
    padded = np.concatenate([np.zeros((B, W - 1, C)) if initial_state is None else initial_state, x], 1)
    seen = np.ones((B, T, W), bool)
    for b in range(B if documents is not None else 0):
        for t in range(T):
            for j in range(W - 1):
                start = max(0, t + j - (W - 1))
                seen[b, t, j] = all(documents[b, s] == documents[b, t] for s in range(start, t))
    return padded, seen


def kept(T, W, documents, B):
    """(B, W-1): which of the last W-1 padded numbers belong to the last document."""
    mask = np.ones((B, W - 1), bool)
    for b in range(B if documents is not None and T > 0 else 0):
        for j in range(W - 1):
            start = max(0, T - (W - 1) + j)
            mask[b, j] = all(documents[b, s] == documents[b, T - 1] for s in range(start, T))
    return mask


def reference(x, weight, bias=None, *, activation=None, initial_state=None, documents=None):
    B, T, W = *x.shape[:2], weight.shape[1]
    padded, seen = taps(x, initial_state, documents, W)
    p = np.zeros(x.shape) + (0 if bias is None else bias)
    for t in range(T):
        for j in range(W):
            p[:, t] += weight[:, j] * padded[:, t + j] * seen[:, t, j, None]
    y = p if activation is None else p / (1 + np.exp(-p))
    return y, padded[:, T:] * kept(T, W, documents, B)[..., None]


def reference_backward(grads, x, weight, bias=None, *, activation=None, initial_state=None, documents=None):
    B, T, W = *x.shape[:2], weight.shape[1]
    padded, seen = taps(x, initial_state, documents, W)
    p = reference(x, weight, bias, initial_state=initial_state, documents=documents)[0]
    s = 1 / (1 + np.exp(-p))
    dp = np.zeros(x.shape) if grads[0] is None else grads[0] * (1 if activation is None else s * (1 + p * (1 - s)))
    dpadded, dweight = np.zeros(padded.shape), np.zeros(weight.shape)
    if grads[1] is not None:
        dpadded[:, T:] += grads[1] * kept(T, W, documents, B)[..., None]
    for t in range(T):
        for j in range(W):
            dpadded[:, t + j] += weight[:, j] * dp[:, t] * seen[:, t, j, None]
            dweight[:, j] += (padded[:, t + j] * dp[:, t] * seen[:, t, j, None]).sum(0)
    found = dict(x=dpadded[:, W - 1 :], weight=dweight)
    if bias is not None:
        found["bias"] = dp.sum((0, 1))
    if initial_state is not None:
        found["initial_state"] = dpadded[:, : W - 1]
    return found


@triton.jit
def load_rows(x, state, runs, own, b, t, c, T, C, W: tl.constexpr):
    """x at times t (from -(W-1), where the state is) of row b, as float32; 0 where the run is not `own`."""
    at = (b * T + t).to(tl.int64) * C + c
    values = tl.load(x + at, (t >= 0) & (t < T) & (c < C), 0).to(tl.float32)
    if state is not None:
        at = (b * (W - 1) + t + W - 1).to(tl.int64) * C + c
        values += tl.load(state + at, (t < 0) & (t > -W) & (c < C), 0).to(tl.float32)
    if runs is not None:
        run = tl.load(runs + b * T + t, (t >= 0) & (t < T), 0)  # the first run is number 0, and so is the state's
        values = tl.where(run == own, values, 0)
    return values


@triton.jit
def preactivation(x, weight, bias, state, runs, own, b, t, c, T, C, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    p = tl.zeros((ROWS, BLOCK), tl.float32)
    if bias is not None:
        p += tl.load(bias + c, c < C, 0).to(tl.float32)
    for lag in tl.static_range(W):
        values = load_rows(x, state, runs, own, b, t - lag, c, T, C, W)
        p += values * tl.load(weight + c * W + (W - 1 - lag), c < C, 0).to(tl.float32)
    return p


@triton.jit
def forward_kernel(
    x, weight, bias, state, runs, y, T, C, tiles, W: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """ROWS times and BLOCK channels a program; the shifted rows of the later taps come from the cache."""
    b = tl.program_id(0) // tiles
    t = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    own = t * 0
    if runs is not None:
        own = tl.load(runs + b * T + t, t < T, 0)
    p = preactivation(x, weight, bias, state, runs, own, b, t, c, T, C, W, ROWS, BLOCK)
    if SILU:
        p = p * tl.sigmoid(p)
    tl.store(y + (b * T + t).to(tl.int64) * C + c, p, (t < T) & (c < C))


@triton.jit
def backward_kernel(
    x, weight, bias, state, runs, dy, dfinal, dx, dstate, dsums, scratch, T, C, tiles, groups,
    W: tl.constexpr, WP: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program goes through every so-many-th tile of times, from -(W-1) on, keeping sums for weight and bias.

    The gradient dp is computed for ROWS times and left in the program's own scratch, which stays in the cache; read back
    with its rows shifted it gives dx for the first ROWS - (W-1) of these times.
    """
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    tap = tl.arange(0, WP)[:, None]
    sums = tl.zeros((WP, BLOCK), tl.float32)  # tap W is the bias
    scratch += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * ROWS * BLOCK
    column = tl.arange(0, BLOCK)[None, :]
    for group in range(tl.program_id(0), groups, tl.num_programs(0)):
        b = group // tiles
        t = group % tiles * (ROWS - W + 1) - (W - 1) + row
        own, last = t * 0, 0
        if runs is not None:
            own = tl.load(runs + b * T + t, (t >= 0) & (t < T), 0)
            last = tl.load(runs + b * T + T - 1)
        at = (b * T + t).to(tl.int64) * C + c
        dp = tl.zeros((ROWS, BLOCK), tl.float32)
        if dy is not None:
            dp += tl.load(dy + at, (t >= 0) & (t < T) & (c < C), 0).to(tl.float32)
            if SILU:
                p = preactivation(x, weight, bias, state, runs, own, b, t, c, T, C, W, ROWS, BLOCK)
                small = tl.exp(-tl.abs(p))
                s = tl.where(p < 0, small, 1) / (1 + small)
                rest = tl.where(p < 0, 1, small) / (1 + small)  # 1 - s with all its digits
                dp *= s * (1 + p * rest)
        tl.store(scratch + row * BLOCK + column, dp)
        tl.debug_barrier()
        dp = tl.where(row < ROWS - W + 1, dp, 0)
        sums += tl.where(tap == W, tl.sum(dp, 0, keep_dims=True), 0)
        d = tl.zeros((ROWS, BLOCK), tl.float32)
        for lag in range(W):
            values = load_rows(x, state, runs, own, b, t - lag, c, T, C, W)
            sums += tl.where(tap == W - 1 - lag, tl.sum(dp * values, 0, keep_dims=True), 0)
            later = tl.load(scratch + (row + lag) * BLOCK + column, row < ROWS - W + 1, 0)
            if runs is not None:
                run = tl.load(runs + b * T + t + lag, (t + lag >= 0) & (t + lag < T), 0)
                later = tl.where(run == own, later, 0)
            d += later * tl.load(weight + c * W + (W - 1 - lag), c < C, 0).to(tl.float32)
        if dfinal is not None:
            place = t - (T - (W - 1))
            handed = (place >= 0) & (place < W - 1) & (own == last) & (c < C)
            d += tl.load(dfinal + (b * (W - 1) + place).to(tl.int64) * C + c, handed, 0).to(tl.float32)
        mine = (row < ROWS - W + 1) & (c < C)
        tl.store(dx + at, d, mine & (t >= 0) & (t < T))
        if dstate is not None:
            tl.store(dstate + (b * (W - 1) + t + W - 1).to(tl.int64) * C + c, d, mine & (t < 0))
        tl.debug_barrier()
    tl.store(dsums + (tl.program_id(0) * (W + 1) + tap).to(tl.int64) * C + c, sums, (tap <= W) & (c < C))


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, runs: Tensor | None) -> Tensor:
    """The sum as W shifted products in place, channels last: on a CPU faster than conv1d, which wants time last."""
    T, W = x.shape[1], weight.shape[1]
    columns = weight.t().contiguous()  # (W, C)
    p = x * columns[W - 1] if bias is None else torch.addcmul(bias, x, columns[W - 1])
    for lag in range(1, W):
        if lag < T:
            p[:, lag:].addcmul_(same(x[:, : T - lag], runs, lag), columns[W - 1 - lag])
        if state is not None:
            many = min(lag, T)
            before = state[:, W - 1 - lag : W - 1 - lag + many]
            p[:, :many].addcmul_(before if runs is None else before * (runs[:, :many, None] == 0), columns[W - 1 - lag])
    return p


def same(x: Tensor, runs: Tensor | None, lag: int) -> Tensor:
    """x, 0 where its run (from the start, or from `lag` on) is another than `lag` away."""
    return x if runs is None else x * (runs[:, lag:] == runs[:, : max(0, runs.shape[1] - lag)]).unsqueeze(-1)


def handed_on(x: Tensor, state: Tensor | None, runs: Tensor | None, W: int) -> Tensor:
    """The final state (B, W-1, C): the last W-1 of state and x."""
    B, T, C = x.shape
    if T >= W - 1:
        last = x[:, T - (W - 1) :]
    else:
        last = torch.cat([x.new_zeros(B, W - 1 - T, C) if state is None else state[:, T:], x], 1)
    return last.clone() if runs is None or T == 0 else last * belongs(runs, W)


def belongs(runs: Tensor, W: int) -> Tensor:
    """(B, W-1, 1): which of the last W-1 numbers are of the last run; those of the state are of the first."""
    padded = torch.cat([runs.new_zeros(runs.shape[0], W - 1), runs], 1)
    return (padded[:, -(W - 1) :] == runs[:, -1:]).unsqueeze(-1)


class CausalConv1d(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, runs: Tensor | None, silu: bool):
        (B, T, C), W = x.shape, weight.shape[1]
        x, weight = x.contiguous(), weight.contiguous()
        state = None if state is None else state.contiguous()
        p = None
        if on_triton(x):
            bias = None if bias is None else bias.contiguous()
            y = torch.empty_like(x)
            rows, block = min(16, power_of_2(T)), min(128, power_of_2(C))
            grid = (B * -(-T // rows), -(-C // block))
            options = dict(W=W, SILU=silu, ROWS=rows, BLOCK=block, num_warps=4)
            launch(forward_kernel, grid, x, weight, bias, state, runs, y, T, C, -(-T // rows), **options)
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            p = convolved(*(None if a is None else a.to(wide) for a in (x, weight, bias, state)), runs)
            y = (torch.nn.functional.silu(p) if silu else p).to(x.dtype)
            p = p if silu else None
        ctx.save_for_backward(x, weight, bias, state, runs, p)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return y, handed_on(x, state, runs, W)

    @staticmethod
    def backward(ctx, dy: Tensor | None, dfinal: Tensor | None):
        x, weight, bias, state, runs, p = ctx.saved_tensors
        (B, T, C), W = x.shape, weight.shape[1]
        dstate = None if state is None else torch.empty_like(state)
        dy, dfinal = (None if d is None else d.contiguous() for d in (dy, dfinal))
        if on_triton(x):
            dx = torch.empty_like(x)
            rows, block = (64 if T > 128 else 16), min(32, power_of_2(C))
            tiles, columns = -(-(T + W - 1) // (rows - W + 1)), -(-C // block)
            shares = max(1, min(B * tiles, programs(x.device) // columns))
            sums = x.new_zeros(shares, W + 1, C, dtype=torch.float32)
            scratch = x.new_empty(shares * columns * rows * block, dtype=torch.float32)
            groups = B * tiles
            grid = (shares, columns) if groups else (0, 0)
            launch(
                backward_kernel, grid, x, weight, bias, state, runs, dy, dfinal, dx, dstate, sums, scratch, T, C, tiles, groups,
                W=W, WP=power_of_2(W + 1), SILU=ctx.silu, ROWS=rows, BLOCK=block, num_warps=8 if rows == 64 else 4,
            )  # fmt: skip
            sums = sums.sum(0)
            dweight, dbias = sums[:W].t(), sums[W]
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            h = x.to(wide)
            g = x.new_zeros(x.shape, dtype=wide) if dy is None else dy.to(wide)
            g = torch.ops.aten.silu_backward(g, p) if ctx.silu else g
            columns = weight.t().to(wide).contiguous()
            padded = x.new_zeros(B, W - 1, C, dtype=wide)  # the gradient of the numbers before the start
            dx, lags = g * columns[W - 1], [(g * h).sum((0, 1))]
            for lag in range(1, W):
                column = columns[W - 1 - lag]
                later = same(g[:, lag:], runs, lag)
                dx[:, : max(0, T - lag)].addcmul_(later, column)
                lags.append((later * h[:, : max(0, T - lag)]).sum((0, 1)))
                if state is not None:
                    many = min(lag, T)
                    place = slice(W - 1 - lag, W - 1 - lag + many)
                    first = g[:, :many] if runs is None else g[:, :many] * (runs[:, :many, None] == 0)
                    padded[:, place].addcmul_(first, column)
                    lags[-1] += (first * state[:, place].to(wide)).sum((0, 1))
            if dfinal is not None:
                g_last = dfinal if runs is None or T == 0 else dfinal * belongs(runs, W)
                many = min(T, W - 1)
                dx[:, T - many :] += g_last[:, W - 1 - many :]
                padded[:, T:] += g_last[:, : max(0, W - 1 - T)]
            dweight, dbias = torch.stack(lags[::-1], 1), g.sum((0, 1))
            dx, dstate = dx.to(x.dtype), None if state is None else padded.to(state.dtype)
        return dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), dstate, None, None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum over i < W of weight[:, W-1-i] x_{t-i}), and the state that continues it.

    x (B, T, C); weight (C, W) of 2 to 8 taps; bias (C,); activation None or "silu"; initial_state (B, W-1, C), the numbers
    before x, oldest first; documents (B, T), integers of which a run of equal ones is a document. Returns y (B, T, C) and
    the final state (B, W-1, C), both in the dtype of x. ValueError for an argument that does not fit.
    """
    require(x.ndim == 3 and x.is_floating_point(), "x", f"floating point (B, T, C), not {x.dtype} {tuple(x.shape)}")
    B, T, C = x.shape
    require(C > 0, "x", "at least one channel, not 0")
    fits = weight.ndim == 2 and weight.shape[0] == C and 2 <= weight.shape[1] <= 8
    require(fits, "weight", f"({C}, W) with W from 2 to 8, not {tuple(weight.shape)}")
    W = weight.shape[1]
    if bias is not None:
        require(bias.shape == (C,), "bias", f"one number a channel, ({C},), not {tuple(bias.shape)}")
    require(activation in (None, "silu"), "activation", f"None or 'silu', not {activation!r}")
    if initial_state is not None:
        shape = (B, W - 1, C)
        require(initial_state.shape == shape, "initial_state", f"{shape}, not {tuple(initial_state.shape)}")
        require(initial_state.dtype == x.dtype, "initial_state", f"the dtype of x, {x.dtype}, not {initial_state.dtype}")
    runs = None
    if documents is not None:
        require(documents.shape == (B, T), "documents", f"{(B, T)}, not {tuple(documents.shape)}")
        require(not documents.is_floating_point(), "documents", f"integers, not {documents.dtype}")
        if T > 0:
            borders = documents[:, 1:] != documents[:, :-1]
            runs = torch.nn.functional.pad(borders.cumsum(1, dtype=torch.int32), (1, 0))
    return apply(CausalConv1d, x, weight, bias, initial_state, runs, activation == "silu")


def step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """One time: x (B, C), state (B, W-1, C); returns y (B, C) and the next state. What causal_conv1d says, with T = 1."""
    require(x.ndim == 2, "x", f"(B, C), not {tuple(x.shape)}")
    y, state = causal_conv1d(x.unsqueeze(1), weight, bias, activation=activation, initial_state=state)
    return y.squeeze(1), state


def pytorch(x, weight, bias=None, *, activation=None, initial_state=None, documents=None):
    (B, T, C), W = x.shape, weight.shape[1]
    padded = torch.cat([x.new_zeros(B, W - 1, C) if initial_state is None else initial_state, x], 1)
    final = padded[:, T:]
    if T == 0:
        p = x + weight.sum() * 0 + (0 if bias is None else bias)
    elif documents is None:
        p = torch.nn.functional.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), bias, groups=C).transpose(1, 2)
    else:
        runs = torch.nn.functional.pad((documents[:, 1:] != documents[:, :-1]).cumsum(1), (W, 0))
        seen = runs.unfold(1, W, 1) == runs[:, W - 1 :].unsqueeze(-1)  # (B, T, W)
        p = (padded.unfold(1, W, 1) * seen.unsqueeze(2) * weight).sum(-1) + (0 if bias is None else bias)
        final = final * (runs[:, T:] == runs[:, -1:]).unsqueeze(-1)
    return torch.nn.functional.silu(p) if activation == "silu" else p, final


def inputs(draw: Draw) -> dict:
    B, T, C = draw.one_of(1, 2, 0), draw.one_of(1, 2, 5, 17, 33, 70, 0), draw.one_of(1, 3, 16, 40)
    W = draw.one_of(2, 3, 4, 8)
    documents = None
    if draw.flag():
        documents = np.cumsum(draw.uniform(B, T) < draw.one_of(0.1, 0.5), 1).astype(np.int64) % draw.one_of(2, 1000)
    return dict(
        x=draw.normal(B, T, C),
        weight=draw.normal(C, W),
        bias=draw.normal(C) if draw.flag() else None,
        activation=draw.one_of(None, "silu"),
        initial_state=draw.normal(B, W - 1, C) if draw.flag() else None,
        documents=documents,
    )


def cost(x, weight, bias=None, *, activation=None, **_) -> tuple[Cost, Cost]:
    W, silu = weight.shape[1], activation is not None
    return (
        Cost((2 * W + 4 * silu) * x.numel(), 2 * bytes_of(x)),
        Cost((4 * W + (2 * W + 8) * silu) * x.numel(), 3 * bytes_of(x)),
    )


SPEC = Spec(
    op=causal_conv1d,
    reference=reference,
    reference_backward=reference_backward,
    pytorch=pytorch,
    inputs=inputs,
    gradients=("x", "weight", "bias", "initial_state"),
    cost=cost,
    gpu=(
        dict(x=Shape((8, 4096, 2048)), weight=Shape((2048, 4)), bias=Shape((2048,)), activation="silu"),
        dict(
            x=Shape((8, 4096, 2048)),
            weight=Shape((2048, 4)),
            bias=Shape((2048,)),
            activation="silu",
            initial_state=Shape((8, 3, 2048)),
            documents=Shape((8, 4096), below=2),
        ),
    ),
    cpu=(dict(x=Shape((1, 1024, 512)), weight=Shape((512, 4)), bias=Shape((512,)), activation="silu"),),
)
