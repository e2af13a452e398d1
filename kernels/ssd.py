"""State space duality, the recurrence of Mamba-2: one decay a head, so that a scan is attention and a chunk is matmuls.

    d_t = dt_t + dt_bias,  or its softplus
    h_t = exp(d_t A) h_{t-1} + d_t x_t B_t^T                    h (P, N) a head
    y_t = h_t C_t + D x_t

Dao and Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), sections 5 and 6: y = (L o C B^T) (d x) with
L_ij = exp(A (d_{j+1} + ... + d_i)). That is linear attention with queries C, keys B, values d x and the logarithm of the
decay d A, whose kernels do the work (kernels/linear_attention.py): states of the chunks, states passed from chunk to
chunk, outputs. With documents, runs of equal numbers, the state is dropped at a run's first time.

With B T H rows of P and N numbers of b bytes and chunks of L times:
    forward    2 B T H (L (N + P) / 2 + 2 N P) FLOPs      B T (2 H P + 2 G N) b + 8 B T H N P / L bytes moved
    backward   2 B T H (5 L (N + P) / 4 + 5 N P) FLOPs    B T (3 H P + 4 G N) b + 16 B T H N P / L bytes moved
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_attention import linear_attention
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

# B batch, T time, H heads, P head width, G groups of heads that share B and C, N state


def discretised(x, dt, A, B, C, dt_bias, dt_softplus, documents):
    """d and a (B, T, H), a = 0 where a document begins; B and C for each head (B, T, H, N)."""
    d = dt if dt_bias is None else dt + dt_bias
    d = np.logaddexp(0, d) if dt_softplus else d
    a = np.exp(d * A)
    if documents is not None and x.shape[1] > 0:
        a[:, 1:] *= (documents[:, 1:] == documents[:, :-1])[..., None]
    B, C = (np.repeat(m, x.shape[2] // m.shape[2], 2) for m in (B, C))
    return d, a, B, C


def states(x, d, a, B, initial_state):
    h = [np.zeros((*x[:, :1].sum(1).shape, B.shape[-1])) if initial_state is None else initial_state]
    for t in range(x.shape[1]):
        h.append(a[:, t, :, None, None] * h[t] + (d[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None])
    return h


def reference(x, dt, A, B, C, D=None, *, dt_bias=None, dt_softplus=False, initial_state=None, documents=None):
    d, a, B, C = discretised(x, dt, A, B, C, dt_bias, dt_softplus, documents)
    h = states(x, d, a, B, initial_state)
    y = np.zeros(x.shape) if D is None else D[:, None] * x
    for t in range(x.shape[1]):
        y[:, t] += (h[t + 1] * C[:, t, :, None]).sum(-1)
    return y, h[-1]


def reference_backward(grads, x, dt, A, B, C, D=None, *, dt_bias=None, dt_softplus=False, initial_state=None, documents=None):
    G, N = B.shape[2:]
    d, a, B, C = discretised(x, dt, A, B, C, dt_bias, dt_softplus, documents)
    h = states(x, d, a, B, initial_state)
    dy = np.zeros(x.shape) if grads[0] is None else grads[0]
    dh = np.zeros(h[0].shape) if grads[1] is None else grads[1]
    du, da, dB, dC = np.zeros(x.shape), np.zeros(a.shape), np.zeros(B.shape), np.zeros(C.shape)
    for t in reversed(range(x.shape[1])):
        dC[:, t] = (dy[:, t, ..., None] * h[t + 1]).sum(2)
        dh = dh + dy[:, t, ..., None] * C[:, t, :, None]
        du[:, t] = (dh * B[:, t, :, None]).sum(-1)  # gradient of d x
        dB[:, t] = (dh * (d[:, t, :, None] * x[:, t])[..., None]).sum(2)
        da[:, t] = (dh * h[t]).sum((2, 3))
        dh = a[:, t, :, None, None] * dh
    dd = da * a * A + (du * x).sum(-1)
    found = dict(x=du * d[..., None] + (0 if D is None else D[:, None] * dy), A=(da * a * d).sum((0, 1)))
    found["dt"] = dd * -np.expm1(-d) if dt_softplus else dd
    found["B"], found["C"] = (m.reshape(*m.shape[:2], G, x.shape[2] // G, N).sum(3) for m in (dB, dC))
    if D is not None:
        found["D"] = (dy * x).sum((0, 1, 3))
    if dt_bias is not None:
        found["dt_bias"] = found["dt"].sum((0, 1))
    if initial_state is not None:
        found["initial_state"] = dh
    return found


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the final state of h_t = exp(d_t A) h_{t-1} + d_t x_t B_t^T, y_t = h_t C_t + D x_t.

    x (B, T, H, P), B and C (B, T, G, N) of one dtype, G dividing H: heads in order share a group. dt (B, T, H), and A, D
    and dt_bias (H,) of any dtype, A negative; initial_state (B, H, P, N); documents (B, T), integers of which a run of
    equal ones is a document. Returns y (B, T, H, P) in the dtype of x and the final state (B, H, P, N) in float32
    (float64 if x is). ValueError for an argument that does not fit.
    """
    require(x.ndim == 4 and x.is_floating_point(), "x", f"floating point (B, T, H, P), not {x.dtype} {tuple(x.shape)}")
    batch, T, H, P = x.shape
    require(H > 0 and 0 < P <= 256, "x", f"at least one head, of 1 to 256 numbers, not {(H, P)}")
    require(dt.shape == (batch, T, H), "dt", f"{(batch, T, H)}, not {tuple(dt.shape)}")
    require(B.ndim == 4 and B.shape[:2] == (batch, T), "B", f"({batch}, {T}, G, N), not {tuple(B.shape)}")
    G, N = B.shape[2:]
    require(G > 0 and H % G == 0, "B", f"a number of groups that divides {H}, not {G}")
    require(0 < N <= 256, "B", f"states of 1 to 256 numbers, not {N}")
    require(C.shape == B.shape, "C", f"the shape of B, {tuple(B.shape)}, not {tuple(C.shape)}")
    for name, value in (("B", B), ("C", C)):
        require(value.dtype == x.dtype, name, f"the dtype of x, {x.dtype}, not {value.dtype}")
    for name, value in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        if value is not None:
            require(value.shape == (H,), name, f"one number a head, ({H},), not {tuple(value.shape)}")
    if initial_state is not None:
        shape = (batch, H, P, N)
        require(initial_state.shape == shape, "initial_state", f"{shape}, not {tuple(initial_state.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    d = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias
    d = F.softplus(d) if dt_softplus else d
    v = x * d.unsqueeze(-1)  # in float32, as y comes back: each is rounded once, at the end
    initial = None if initial_state is None else initial_state.to(wide).mT
    y, final = linear_attention(C, B, v, d * A, scale=1.0, initial_state=initial, documents=documents)
    y = y if D is None else torch.addcmul(y, x.to(wide), D.to(wide).unsqueeze(-1))
    return y.to(x.dtype), final.mT


def step(x, dt, A, B, C, D=None, *, state: Tensor, **options) -> tuple[Tensor, Tensor]:
    """One time of ssd: x (B, H, P), dt (B, H), B, C (B, G, N), state (B, H, P, N). Returns y (B, H, P) and the next state."""
    require(x.ndim == 3, "x", f"(B, H, P), not {tuple(x.shape)}")
    x, dt, B, C = (value.unsqueeze(1) for value in (x, dt, B, C))
    y, state = ssd(x, dt, A, B, C, D, initial_state=state, **options)
    return y.squeeze(1), state


def pytorch(x, dt, A, B, C, D=None, *, dt_bias=None, dt_softplus=False, initial_state=None, documents=None):
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    d = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias
    d = F.softplus(d) if dt_softplus else d
    a, u = (d * A).exp().to(x.dtype), (x * d.unsqueeze(-1)).to(x.dtype)
    B, C = (m.repeat_interleave(H // G, 2) for m in (B, C))
    h = x.new_zeros(batch, H, P, N) if initial_state is None else initial_state.to(x.dtype)
    h = h + 0 * (a.sum() + u.sum() + B.sum())
    ys = []
    for t in range(T):
        if documents is not None and t > 0:
            h = h * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        h = a[:, t, :, None, None] * h + u[:, t].unsqueeze(-1) * B[:, t].unsqueeze(-2)
        ys.append((h @ C[:, t].unsqueeze(-1)).squeeze(-1))
    y = torch.stack(ys, 1) if ys else x + 0 * (u.sum() + a.sum() + C.sum())
    return y if D is None else (y + x * D.unsqueeze(-1)).to(x.dtype), h.to(wide)


def inputs(draw: Draw) -> dict:
    batch, T, H = draw.one_of(1, 2, 0), draw.one_of(1, 5, 17, 33, 0), draw.one_of(2, 1, 4)
    P, N, G = draw.one_of(1, 8, 20), draw.one_of(1, 8, 20), draw.one_of(1, H)
    documents = None
    if draw.flag():
        documents = np.cumsum(draw.uniform(batch, T) < draw.one_of(0.05, 0.3), 1).astype(np.int64) % draw.one_of(2, 1000)
    softplus = draw.flag()
    return dict(
        x=draw.normal(batch, T, H, P),
        dt=draw.normal(batch, T, H, scale=2.0) if softplus else draw.uniform(batch, T, H, high=0.5),
        A=-draw.uniform(H, low=0.1, high=draw.one_of(1.0, 16.0)),
        B=draw.normal(batch, T, G, N),
        C=draw.normal(batch, T, G, N),
        D=draw.normal(H) if draw.flag() else None,
        dt_bias=draw.uniform(H, high=0.5) if draw.flag() else None,
        dt_softplus=softplus,
        initial_state=draw.normal(batch, H, P, N) if draw.flag() else None,
        documents=documents,
    )


def cost(x, dt, A, B, C, D=None, **_) -> tuple[Cost, Cost]:
    (batch, T, H, P), N, L = x.shape, B.shape[-1], 64
    rows, moved = batch * T * H, 2 * 4 * batch * H * T / L * N * P
    return (
        Cost(2 * rows * (L * (N + P) / 2 + 2 * N * P), bytes_of(x, x, B, C) + moved),
        Cost(2 * rows * (1.25 * L * (N + P) + 5 * N * P), bytes_of(x, x, x) + 2 * bytes_of(B, C) + 2 * moved),
    )


def example(batch: int, T: int, H: int, P: int, N: int, **more) -> dict:
    once, wide = Shape((H,)), Shape((batch, T, 1, N))
    call = dict(x=Shape((batch, T, H, P)), dt=Shape((batch, T, H)), A=Shape((H,), sign=-1), B=wide, C=wide, D=once)
    return call | dict(dt_bias=once, dt_softplus=True) | more


SPEC = Spec(
    op=ssd,
    reference=reference,
    reference_backward=reference_backward,
    pytorch=pytorch,
    inputs=inputs,
    gradients=("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state"),
    cost=cost,
    gpu=(example(4, 4096, 32, 64, 128),),
    cpu=(example(1, 1024, 16, 64, 64),),
    wide=("dt", "A", "D", "dt_bias", "initial_state"),
)
