"""Selective scan, the recurrence of Mamba: a diagonal linear system whose decay and input are chosen by the data.

    d_t = delta_t + delta_bias,  or its softplus
    h_t = exp(d_t A) h_{t-1} + d_t u_t B_t              per channel D and state N: A exactly discretised, B by Euler's rule
    y_t = (sum_n C_t h_t + D u_t) silu(z_t)             without D and z where they are not given

Gu and Dao 2023, "Mamba" (arXiv:2312.00752), eq. 2 and section 3.2, discretised as in the authors' code. The scan stores h
at the borders of chunks of K times only; the backward pass computes the others again (section 3.3.2). With documents, runs
of equal numbers, exp(d_t A) is 0 at a run's first time; the initial state belongs to the first run. The Triton path is
kernels/selective_kernels.py, the PyTorch path kernels/scan_chunks.py.

With B T D numbers of b bytes in u (exp counted as 1):
    forward    6 B T D N FLOPs       (3 + z) B T D b + 2 B T N b + 4 B T D N / K bytes moved: u, delta, z, B, C; y; borders
    backward   19 B T D N FLOPs      (5 + 2 z) B T D b + 4 B T N b + 4 B T D N / K bytes moved
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import Function, apply, launch, on_triton
from kernels.scan_chunks import scan, scan_backward, time_first
from kernels.selective_kernels import backward_kernel, blocks_of, forward_kernel
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

# B batch, T time, D channels, N state, K times of a chunk


def discretised(u, delta, A, B, delta_bias, delta_softplus, documents):
    """d (B, T, D), and a, b (B, T, D, N) of h_t = a_t h_{t-1} + b_t."""
    d = delta if delta_bias is None else delta + delta_bias
    d = np.logaddexp(0, d) if delta_softplus else d
    a = np.exp(d[..., None] * A)
    for row, t in zip(*np.nonzero(documents[:, 1:] != documents[:, :-1]), strict=True) if documents is not None else ():
        a[row, t + 1] = 0
    return d, a, (d * u)[..., None] * B[:, :, None]


def states(a, b, initial_state):
    """h (B, T + 1, D, N), the initial state first."""
    h = np.zeros((a.shape[0], a.shape[1] + 1, *a.shape[2:]))
    if initial_state is not None:
        h[:, 0] = initial_state
    for t in range(a.shape[1]):
        h[:, t + 1] = a[:, t] * h[:, t] + b[:, t]
    return h


def reference(u, delta, A, B, C, D=None, z=None, *, delta_bias=None, delta_softplus=False, initial_state=None, documents=None):
    _, a, b = discretised(u, delta, A, B, delta_bias, delta_softplus, documents)
    h = states(a, b, initial_state)
    y = (C[:, :, None] * h[:, 1:]).sum(-1) + (0 if D is None else D * u)
    return y if z is None else y * z / (1 + np.exp(-z)), h[:, -1]


def reference_backward(
    grads, u, delta, A, B, C, D=None, z=None, *, delta_bias=None, delta_softplus=False, initial_state=None, documents=None
):
    d, a, b = discretised(u, delta, A, B, delta_bias, delta_softplus, documents)
    h = states(a, b, initial_state)
    found = {}
    dy = np.zeros(u.shape) if grads[0] is None else grads[0]
    if z is not None:
        s = 1 / (1 + np.exp(-z))
        y = (C[:, :, None] * h[:, 1:]).sum(-1) + (0 if D is None else D * u)
        found["z"] = dy * y * s * (1 + z * (1 - s))
        dy = dy * z * s
    dh = np.zeros(h[:, 0].shape) if grads[1] is None else grads[1].copy()
    da, db = np.zeros(a.shape), np.zeros(a.shape)
    for t in reversed(range(a.shape[1])):
        dh += C[:, t, None] * dy[:, t, :, None]
        da[:, t], db[:, t] = dh * h[:, t], dh
        dh = a[:, t] * dh
    dx = (db * B[:, :, None]).sum(-1)  # gradient of d u
    dd = dx * u + (da * a * A).sum(-1)
    found |= dict(u=dx * d + (0 if D is None else D * dy), A=(da * a * d[..., None]).sum((0, 1)))
    found |= dict(B=(db * (d * u)[..., None]).sum(2), C=(h[:, 1:] * dy[..., None]).sum(2))
    found["delta"] = dd * -np.expm1(-d) if delta_softplus else dd  # the derivative of softplus is 1 - exp(-softplus)
    if D is not None:
        found["D"] = (dy * u).sum((0, 1))
    if delta_bias is not None:
        found["delta_bias"] = found["delta"].sum((0, 1))
    if initial_state is not None:
        found["initial_state"] = dh
    return found


class SelectiveScan(Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, initial, keep, softplus):
        (batch, T, DS), N = u.shape, A.shape[1]
        wide = torch.promote_types(u.dtype, torch.float32)
        plain = None
        if on_triton(u):
            u, delta, A, B, C, D, z, delta_bias, initial = (
                None if x is None else x.contiguous() for x in (u, delta, A, B, C, D, z, delta_bias, initial)
            )
            options = blocks_of(DS, N, T)
            blocks = -(-DS // options["BD"])
            y, final = torch.empty_like(u), u.new_empty(batch, DS, N, dtype=wide)
            borders = u.new_empty(batch, -(-T // options["K"]), DS, N, dtype=wide)
            launch(
                forward_kernel, (batch * blocks,), u, delta, A, B, C, D, z, delta_bias, initial, keep, y, borders, final,
                T, DS, N, blocks, SOFTPLUS=softplus, **options,
            )  # fmt: skip
        else:
            d = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias
            delta = F.softplus(d) if softplus else d
            x, d, B_, C_ = time_first(delta * u, delta, B, C, dtype=wide)
            first = u.new_zeros(batch, N, DS, dtype=wide) if initial is None else initial.to(wide).mT.contiguous()
            mask = None if keep is None else keep.to(wide).t().contiguous()
            y, borders, final = scan(x, d, A.to(wide).t().contiguous(), B_, C_, first, mask)
            y, final = y.transpose(0, 1), final.mT.contiguous()
            y = y if D is None else torch.addcmul(y, u.to(wide), D.to(wide))
            if z is not None:
                plain = y
                y = y * F.silu(z.to(wide))
            y = y.to(u.dtype)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial, keep, borders, plain)
        ctx.softplus = softplus
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx, dy: Tensor | None, dfinal: Tensor | None):
        u, delta, A, B, C, D, z, delta_bias, initial, keep, borders, plain = ctx.saved_tensors
        (batch, T, DS), N = u.shape, A.shape[1]
        wide = torch.promote_types(u.dtype, torch.float32)
        dz = None if z is None else torch.empty_like(z)
        if on_triton(u):
            options = blocks_of(DS, N, T)
            blocks = -(-DS // options["BD"])
            dy, dfinal = (None if d is None else d.contiguous() for d in (dy, dfinal))
            du, ddelta = torch.empty_like(u), torch.empty_like(delta)
            narrow, square, once = (u.new_empty(2, batch, *shape, dtype=wide) for shape in ((T, blocks, N), (DS, N), (DS,)))
            scratch = u.new_empty(batch * blocks, options["K"], options["BD"], options["NP"], dtype=wide)
            launch(
                backward_kernel, (batch * blocks,), u, delta, A, B, C, D, z, delta_bias, keep, borders, dy, dfinal, scratch,
                du, ddelta, dz, narrow, square, once, T, DS, N, blocks, narrow[0].numel(), SOFTPLUS=ctx.softplus, **options,
            )  # fmt: skip
            (dB, dC), (dD, dbias) = narrow.sum(3), once.sum(1)
            dA, dinitial = square[0].sum(0), square[1]
        else:
            dy = u.new_zeros(u.shape, dtype=wide) if dy is None else dy.to(wide)
            if z is not None:
                dz = torch.ops.aten.silu_backward(dy * plain, z.to(wide))
                dy = dy * F.silu(z.to(wide))
            carry = u.new_zeros(batch, N, DS, dtype=wide) if dfinal is None else dfinal.mT.contiguous()
            g, x, d, B_, C_ = time_first(dy, delta * u, delta, B, C, dtype=wide)
            mask = None if keep is None else keep.to(wide).t().contiguous()
            found = scan_backward(g, carry, x, d, A.to(wide).t().contiguous(), B_, C_, borders, mask)
            dx, dd, dB, dC = (g.transpose(0, 1) for g in (found[0], found[1], found[3], found[4]))
            dA, dinitial = found[2].t(), found[5].mT
            ddelta = torch.addcmul(dd, dx, u.to(wide))
            ddelta = ddelta * -torch.expm1(-delta) if ctx.softplus else ddelta
            du = dx * delta if D is None else (dx * delta).addcmul_(dy, D.to(wide))
            dD = None if D is None else (dy * u).sum((0, 1))
            dbias = ddelta.sum((0, 1))
        pairs = ((du, u), (ddelta, u), (dA, A), (dB, B), (dC, C), (dD, D), (dz, z), (dbias, delta_bias), (dinitial, initial))
        return *(None if like is None else g.to(like.dtype) for g, like in pairs), None, None


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the final state of h_t = exp(d_t A) h_{t-1} + d_t u_t B_t, y_t = (C_t h_t + D u_t) silu(z_t).

    u, delta and z (B, T, D), B and C (B, T, N), all of one dtype; A (D, N), D and delta_bias (D,), initial_state (B, D, N)
    of any dtype; documents (B, T), integers of which a run of equal ones is a document. Returns y (B, T, D) in the dtype
    of u and the final state (B, D, N) in float32 (float64 if u is). ValueError for an argument that does not fit.
    """
    require(u.ndim == 3 and u.is_floating_point(), "u", f"floating point (B, T, D), not {u.dtype} {tuple(u.shape)}")
    batch, T, DS = u.shape
    require(A.ndim == 2 and A.shape[0] == DS and A.shape[1] > 0 and DS > 0, "A", f"({DS}, N), not {tuple(A.shape)}")
    N = A.shape[1]
    require(N <= 256, "A", f"a state of at most 256 numbers a channel, not {N}")
    shapes = dict(delta=(delta, (batch, T, DS)), B=(B, (batch, T, N)), C=(C, (batch, T, N)), z=(z, (batch, T, DS)))
    for name, (value, shape) in shapes.items():
        if value is not None:
            require(value.shape == shape, name, f"{shape}, not {tuple(value.shape)}")
            require(value.dtype == u.dtype, name, f"the dtype of u, {u.dtype}, not {value.dtype}")
    shapes = dict(D=(D, (DS,)), delta_bias=(delta_bias, (DS,)), initial_state=(initial_state, (batch, DS, N)))
    for name, (value, shape) in shapes.items():
        if value is not None:
            require(value.shape == shape, name, f"{shape}, not {tuple(value.shape)}")
    keep = None
    if documents is not None:
        require(documents.shape == (batch, T), "documents", f"{(batch, T)}, not {tuple(documents.shape)}")
        require(not documents.is_floating_point(), "documents", f"integers, not {documents.dtype}")
        if T > 0:
            keep = F.pad((documents[:, 1:] == documents[:, :-1]).float(), (1, 0), value=1.0)
    return apply(SelectiveScan, u, delta, A, B, C, D, z, delta_bias, initial_state, keep, delta_softplus)


def step(u, delta, A, B, C, D=None, z=None, *, state: Tensor, **options) -> tuple[Tensor, Tensor]:
    """One time of selective_scan: u, delta, z (B, D), B, C (B, N), state (B, D, N). Returns y (B, D) and the next state."""
    require(u.ndim == 2, "u", f"(B, D), not {tuple(u.shape)}")
    u, delta, B, C, z = (None if x is None else x.unsqueeze(1) for x in (u, delta, B, C, z))
    y, state = selective_scan(u, delta, A, B, C, D, z, initial_state=state, **options)
    return y.squeeze(1), state


def pytorch(u, delta, A, B, C, D=None, z=None, *, delta_bias=None, delta_softplus=False, initial_state=None, documents=None):
    wide = torch.promote_types(u.dtype, torch.float32)
    d = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias
    d = F.softplus(d) if delta_softplus else d
    a, b = torch.exp(d.unsqueeze(-1) * A), (d * u).unsqueeze(-1) * B.to(wide).unsqueeze(2)
    h = u.new_zeros(a.shape[:1] + a.shape[2:], dtype=wide) if initial_state is None else initial_state.to(wide)
    ys = []
    for t in range(u.shape[1]):
        if documents is not None and t > 0:
            h = h * (documents[:, t] == documents[:, t - 1])[:, None, None]
        h = a[:, t] * h + b[:, t]
        ys.append((h * C[:, t].to(wide).unsqueeze(1)).sum(-1))
    y = torch.stack(ys, 1) if ys else u.to(wide) * 0 + 0 * (a.sum() + b.sum() + C.sum())
    y = y if D is None else y + u * D
    y = y if z is None else y * F.silu(z.to(wide))
    return y.to(u.dtype), h + 0 * (a.sum() + b.sum())


def inputs(draw: Draw) -> dict:
    B, T, D, N = draw.one_of(1, 2, 0), draw.one_of(1, 3, 9, 20, 33, 0), draw.one_of(1, 5, 40), draw.one_of(1, 3, 16)
    documents = None
    if draw.flag():
        documents = np.cumsum(draw.uniform(B, T) < draw.one_of(0.1, 0.5), 1).astype(np.int64) % draw.one_of(2, 1000)
    softplus = draw.flag()
    return dict(
        u=draw.normal(B, T, D),
        delta=draw.normal(B, T, D, scale=draw.one_of(1.0, 5.0)) if softplus else draw.uniform(B, T, D, high=0.5),
        A=-draw.uniform(D, N, low=0.1, high=draw.one_of(1.0, 16.0)),
        B=draw.normal(B, T, N),
        C=draw.normal(B, T, N),
        D=draw.normal(D) if draw.flag() else None,
        z=draw.normal(B, T, D) if draw.flag() else None,
        delta_bias=draw.uniform(D, high=0.5) if draw.flag() else None,
        delta_softplus=softplus,
        initial_state=draw.normal(B, D, N) if draw.flag() else None,
        documents=documents,
    )


def cost(u, delta, A, B, C, D=None, z=None, **_) -> tuple[Cost, Cost]:
    numbers, gate, N = u.numel(), z is not None, A.shape[1]
    borders = 4 * numbers * N // 32
    return (
        Cost(6 * numbers * N, (3 + gate) * bytes_of(u) + bytes_of(B, C) + borders),
        Cost(19 * numbers * N, (5 + 2 * gate) * bytes_of(u) + 2 * bytes_of(B, C) + borders),
    )


def example(B: int, T: int, D: int, N: int = 16, **more) -> dict:
    wide, narrow, once = Shape((B, T, D)), Shape((B, T, N)), Shape((D,))
    call = dict(u=wide, delta=wide, A=Shape((D, N), sign=-1), B=narrow, C=narrow, D=once, z=wide)
    return call | dict(delta_bias=once, delta_softplus=True) | more


SPEC = Spec(
    op=selective_scan,
    reference=reference,
    reference_backward=reference_backward,
    pytorch=pytorch,
    inputs=inputs,
    gradients=("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"),
    cost=cost,
    gpu=(
        example(8, 2048, 2048),
        example(8, 2048, 2048, initial_state=Shape((8, 2048, 16)), documents=Shape((8, 2048), below=2)),
    ),
    cpu=(example(1, 1024, 512),),
    wide=("A", "D", "delta_bias", "initial_state"),
)
