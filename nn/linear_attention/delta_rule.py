"""The delta rule in chunks: a matrix that, before it is written to at a key, forgets what it holds there."""

import torch
from torch import Tensor

from kernels.chunks import chunked, whole
from kernels.spec import require

# B batch, T time, H heads, D key dim, V value dim, n chunks of L times


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    documents: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """o_t = S_t^T q_t and the last state of S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T.

    Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (arXiv:2406.06484);
    with decays Yang et al. 2024, "Gated Delta Networks" (arXiv:2412.06464), eq. 10. Keys should be of unit length: then
    beta = 1 replaces what S holds at k by v.

    Let u_t = beta_t (v_t - (exp(g_t) S_{t-1})^T k_t), what is written at time t. In a chunk that begins with S, and with c
    the running sum of g in it, the u solve a triangular system, and the rest is products of matrices (section 3.2):

        (I + A) U = diag(beta) (V - diag(exp c) K S),        A_ij = beta_i exp(c_i - c_j) k_i.k_j for j < i
        o_i = exp(c_i) S^T q_i + sum_{j <= i} exp(c_i - c_j) (q_i.k_j) u_j
        S' = exp(c_L) S + sum_j exp(c_L - c_j) k_j u_j^T

    q and k (B, T, H, D); v (B, T, H, V); beta (B, T, H) in [0, 1], or to 2 for negative eigenvalues; g (B, T, H), at most 0,
    or None. initial_state (B, H, D, V); documents (B, T), integers of which a run of equal ones is a document: the state
    is dropped where one begins, and the initial state belongs to the first. The length of a `chunk` changes the time it
    takes and nothing else. Returns o (B, T, H, V) in the dtype of v and the state (B, H, D, V) in float32 (float64 if v
    is). Gradients are autograd's. ValueError for an argument that does not fit.
    """
    require(v.ndim == 4, "v", f"(B, T, H, V), not {tuple(v.shape)}")
    B, T, H, V = v.shape
    require(q.ndim == 4 and q.shape[:3] == (B, T, H), "q", f"({B}, {T}, {H}, D), not {tuple(q.shape)}")
    require(k.shape == q.shape, "k", f"the shape of q, {tuple(q.shape)}, not {tuple(k.shape)}")
    for name, x in (("beta", beta), ("g", g)):
        require(x is None or x.shape == (B, T, H), name, f"({B}, {T}, {H}), not {x is not None and tuple(x.shape)}")
    require(chunk >= 1, "chunk", f"at least one time, not {chunk}")
    D, wide = q.shape[-1], torch.promote_types(v.dtype, torch.float32)
    S = v.new_zeros(B, H, D, V, dtype=wide) if initial_state is None else initial_state.to(wide)
    require(S.shape == (B, H, D, V), "initial_state", f"{(B, H, D, V)}, not {tuple(S.shape)}")
    require(documents is None or documents.shape == (B, T), "documents", f"{(B, T)}, one number a token")
    if T == 0:
        return torch.zeros_like(v), S
    L = min(chunk, T)
    g = torch.zeros_like(beta) if g is None else g
    q, k, v_, beta, g = (chunked(x.to(wide), L) for x in (q, k, v, beta.unsqueeze(-1), g.unsqueeze(-1)))
    pairs, seen, left, through = decays(g, documents)
    A = (beta * (k @ k.mT) * pairs).tril(-1)  # (B, H, n, L, L)
    both = torch.linalg.solve_triangular(A, beta * torch.cat([v_, seen * k], -1), upper=False, unitriangular=True)
    fresh, erased = both.split([V, D], -1)  # u = fresh - erased S
    scores, read, written = (q @ k.mT) * pairs, seen * q, left * k
    out = []
    for i in range(g.shape[2]):
        u = fresh[:, :, i] - erased[:, :, i] @ S  # (B, H, L, V)
        out.append(read[:, :, i] @ S + scores[:, :, i] @ u)
        S = through[:, :, i] * S + written[:, :, i].mT @ u
    return whole(torch.stack(out, 2), T).to(v.dtype), S


def decays(g: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of g (B, H, n, L, 1) the decay from time j to i >= j of a chunk, into it, out of it, and through it; 0 across documents.

    (B, H, n, L, L), (B, H, n, L, 1), (B, H, n, L, 1) and (B, H, n, 1, 1). Every exponent is a sum of its own and at most
    0, so that a long chunk loses no digits.
    """
    L = g.shape[3]
    between = g.expand(*g.shape[:-1], L).tril(-1).cumsum(-2)  # (i, j): the sum over j < l <= i
    pairs, left = between.exp().tril(), between[..., -1:, :].mT.exp()
    seen, through = g.cumsum(-2).exp(), g.sum(-2, keepdim=True).exp()
    if documents is None:
        return pairs, seen, left, through
    runs = (documents[:, 1:] != documents[:, :-1]).cumsum(1)
    runs = torch.cat([torch.zeros_like(documents[:, :1]), runs], 1)
    runs = torch.cat([runs, runs[:, -1:].expand(-1, -runs.shape[1] % L)], 1).unflatten(1, (-1, L))[:, None, ..., None]
    last = runs[..., -1:, :]  # (B, 1, n, 1, 1)
    earlier = torch.cat([torch.zeros_like(last[:, :, :1]), last[:, :, :-1]], 2)  # the run before the chunk
    return pairs * (runs == runs.mT), seen * (runs == earlier), left * (runs == last), through * (earlier == last)
