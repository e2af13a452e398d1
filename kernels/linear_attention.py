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
The Triton path is kernels/chunk_kernels.py, the PyTorch path kernels/chunks.py.

With B T H rows of D and V numbers of b bytes (log2 L more products of L D with gates a channel):
    forward    2 B T H (L (D + V) / 2 + 2 D V) FLOPs      B T H (2 D + 2 V) b + 8 B T H D V / L bytes moved
    backward   2 B T H (5 L (D + V) / 4 + 5 D V) FLOPs    B T H (4 D + 3 V) b + 16 B T H D V / L bytes moved
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.chunk_kernels import triton_backward, triton_forward
from kernels.chunks import attend, attend_backward
from kernels.launch import Function, apply, on_triton
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


class LinearAttention(Function):
    @staticmethod
    def forward(ctx, q, k, v, g, initial, runs, scale):
        if on_triton(v):
            q, k, v, g, initial = (None if x is None else x.contiguous() for x in (q, k, v, g, initial))
            o, borders, final = triton_forward(q, k, v, g, initial, runs, scale)
        else:
            (B, _, H, V), D, wide = v.shape, q.shape[-1], torch.promote_types(v.dtype, torch.float32)
            first = v.new_zeros(B, H, D, V, dtype=wide) if initial is None else initial.to(wide).contiguous()
            o, borders, final = attend(q, k, v, g, first, runs, scale)
            o = o.to(v.dtype)
        ctx.save_for_backward(q, k, v, g, initial, runs, borders)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx, do: Tensor | None, dfinal: Tensor | None):
        q, k, v, g, initial, runs, borders = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        if on_triton(v):
            dq, dk, dv, dg, dinitial = triton_backward(do, dfinal, q, k, v, g, initial, borders, runs, ctx.scale)
        else:
            (B, _, H, V), D = v.shape, q.shape[-1]
            dfinal = borders.new_zeros(B, H, D, V) if dfinal is None else dfinal
            dq, dk, dv, dg, dinitial = attend_backward(do, dfinal, q, k, v, g, borders, runs, ctx.scale)
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
