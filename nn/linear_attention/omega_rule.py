"""The Omega rule: a matrix that learns while it reads, by a step at each token down the loss of recalling the last few."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.newton_schulz import EPS, QUINTIC
from kernels.spec import require

# B batch, T time, H heads, N numbers of a key, V value dim, c tokens of the window, L times of a chunk

Memory = tuple[Tensor, Tensor | None]


def omega_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    gates: Tensor,
    g: Tensor | None = None,
    theta: Tensor | None = None,
    *,
    initial_state: Memory | None = None,
    documents: Tensor | None = None,
    chunk: int = 16,
) -> tuple[Tensor, Memory]:
    """o_t = M_t^T q_t, and the last M (and S), of a memory M that recalls v_i at k_i as M^T k_i.

    Behrouz et al. 2025, "ATLAS: Learning to Optimally Memorize the Context at Test Time" (arXiv:2505.23735), the Omega
    rule: a step of gradient descent on sum_i gates_ti |M^T k_i - v_i|^2 / 2 over the tokens i = t - c + 1 … t,

        G_t = sum_i gates_ti k_i (M_{t-1}^T k_i - v_i)^T
        M_t = exp(g_t) M_{t-1} - eta_t G_t                                  without theta, as in OmegaNet
        M_t = exp(g_t) M_{t-1} - eta_t NewtonSchulz5(S_t),  S_t = theta_t S_{t-1} + G_t      with theta, as in ATLAS

    With c = 1 and gates of 1 the first is the delta rule. It is computed exactly, in chunks: what M recalls at each key and
    query of a chunk follows the same recurrence, with products of keys in place of keys, so that M itself is needed once a
    chunk only. That takes a fifth of the time of the loop over M, which the second, no longer linear in M, has to be.

    q (B, T, H, N); k (B, c - 1 + T, H, N) and v (B, c - 1 + T, H, V), the first c - 1 of them from before the first time; eta
    and theta (B, T, H); gates (B, T, H, c), those of a token's window from its oldest key to its own, as `in_window` gives
    them; g (B, T, H), at most 0, or None. initial_state: M (B, H, N, V), and S with theta. documents (B, T), integers of
    which a run of equal ones is a document: where one begins, M and S are dropped; the initial state belongs to the first.
    The length of a `chunk` changes the time it takes and nothing else. Returns o (B, T, H, V) in the dtype of v, and M and S
    (None without theta) in float32, or float64 if v is. With theta all is computed and returned in float64: Newton-Schulz
    multiplies what rounding leaves in directions that are empty, as most are at first, by up to 3.4445^5 = 485. Gradients are
    autograd's. ValueError for an argument that does not fit.
    """
    require(q.ndim == 4, "q", f"(B, T, H, N), not {tuple(q.shape)}")
    B, T, H, N = q.shape
    require(gates.ndim == 4 and gates.shape[:3] == (B, T, H), "gates", f"({B}, {T}, {H}, c), not {tuple(gates.shape)}")
    S = gates.shape[3] - 1 + T
    require(k.shape == (B, S, H, N), "k", f"{(B, S, H, N)}, not {tuple(k.shape)}")
    require(v.ndim == 4 and v.shape[:3] == (B, S, H), "v", f"({B}, {S}, {H}, V), not {tuple(v.shape)}")
    for name, x in (("eta", eta), ("g", g), ("theta", theta)):
        require(x is None or x.shape == (B, T, H), name, f"({B}, {T}, {H}), not {x is not None and tuple(x.shape)}")
    require(documents is None or documents.shape == (B, T), "documents", f"{(B, T)}, one number a token")
    require(chunk >= 1, "chunk", f"at least one time, not {chunk}")
    wide = torch.promote_types(v.dtype, torch.float32) if theta is None else torch.float64
    M, momentum = (None, None) if initial_state is None else initial_state
    M = q.new_zeros(B, H, N, v.shape[3], dtype=wide) if M is None else M.to(wide)
    require(M.shape == (B, H, N, v.shape[3]), "initial_state", f"M of {(B, H, N, v.shape[3])}, not {tuple(M.shape)}")
    g = torch.zeros_like(eta) if g is None else g
    q, k, v_, gates, eta, g = (x.to(wide).transpose(1, 2) for x in (q, k, v, gates, eta, g))  # (B, H, T, …)
    keep, steps = g.exp()[..., None, None], eta[..., None, None] * gates.unsqueeze(-1)  # (B, H, T, 1, 1), (B, H, T, c, 1)
    goes_on = None  # (B, 1, T, 1, 1): 0 where a document begins
    if documents is not None:
        goes_on = F.pad(documents[:, 1:] == documents[:, :-1], (1, 0), value=True).to(wide)[:, None, :, None, None]
    if theta is not None:
        momentum = torch.zeros_like(M) if momentum is None else momentum.to(wide)
        theta, eta = (x.to(wide)[..., None, None] for x in (theta.transpose(1, 2), eta))
        o, *state = by_momentum(q, k, v_, eta, gates.unsqueeze(-1), keep, theta, M, momentum, goes_on)
        return o.transpose(1, 2).to(v.dtype), (state[0], state[1])
    o = []
    for start in range(0, T, chunk):
        now, seen = slice(start, start + chunk), slice(start, start + chunk + S - T)
        alive = None if goes_on is None else goes_on[:, :, now]
        made, M = by_predictions(q[:, :, now], k[:, :, seen], v_[:, :, seen], steps[:, :, now], keep[:, :, now], M, alive)
        o.append(made)
    return (torch.cat(o, 2) if o else v_[:, :, :0]).transpose(1, 2).to(v.dtype), (M, None)


def by_predictions(
    q: Tensor, k: Tensor, v: Tensor, steps: Tensor, keep: Tensor, M: Tensor, goes_on: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o (B, H, L, V) of a chunk and the M after it.

    R holds M_t^T x for every key and every query x of the chunk, and below them how much of each value's dim has been
    written at each key since the chunk began: M_t = decay M_0 + K^T W_t. All rows obey R_t = keep_t R_{t-1} + P u_t, where
    u_t (c, V) is what is written at the keys of t's window and P what these keys are to the rows.
    """
    (L, c), n = steps.shape[2:4], k.shape[2]
    rows = torch.cat([k, q], 2)  # (B, H, n + L, N)
    one = torch.eye(n, dtype=k.dtype, device=k.device).expand(*k.shape[:2], n, n)
    P = torch.cat([rows @ k.mT, one], 2)  # (B, H, n + L + n, n)
    R, o = F.pad(rows @ M, (0, 0, 0, n)), []  # (B, H, n + L + n, V)
    for t in range(L):
        window = slice(t, t + c)
        R = R if goes_on is None else R * goes_on[:, :, t]
        u = steps[:, :, t] * (v[:, :, window] - R[:, :, window])  # (B, H, c, V)
        R = torch.addcmul(P[..., window] @ u, keep[:, :, t], R)
        o.append(R[:, :, n + t])
    through = keep if goes_on is None else keep * goes_on
    return torch.stack(o, 2), through.prod(2) * M + k.mT @ R[:, :, n + L :]


def by_momentum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    gates: Tensor,
    keep: Tensor,
    theta: Tensor,
    M: Tensor,
    S: Tensor,
    goes_on: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, H, T, V), M and S, time by time."""
    c, o = gates.shape[3], []
    for t in range(q.shape[2]):
        if goes_on is not None:
            M, S = M * goes_on[:, :, t], S * goes_on[:, :, t]
        K, values = k[:, :, t : t + c], v[:, :, t : t + c]  # (B, H, c, N or V)
        S = theta[:, :, t] * S + K.mT @ (gates[:, :, t] * (K @ M - values))  # (B, H, N, V)
        M = keep[:, :, t] * M - eta[:, :, t] * orthogonal(S)
        o.append(q[:, :, t, None] @ M)
    return (torch.cat(o, 2) if o else v[:, :, :0]), M, S


def orthogonal(x: Tensor) -> Tensor:
    """U V^T of x = U S V^T (…, N, V), roughly: `newton_schulz` of five steps, here with a gradient and in the dtype of x."""
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def in_window(gate: Tensor, window: int, documents: Tensor | None = None) -> Tensor:
    """gates (B, T, H, c) of a gate (B, c - 1 + T, H) a token: those of its window, 0 for tokens of another document."""
    T = gate.shape[1] - window + 1
    at = torch.arange(T, device=gate.device)[:, None] + torch.arange(window, device=gate.device)  # (T, c)
    gates = gate[:, at].mT  # (B, T, H, c)
    if documents is None:
        return gates
    runs = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0)).cumsum(1)
    of_key = F.pad(runs, (window - 1, 0))[:, at]  # (B, T, c): what came before the first time is of the first run
    return gates * (of_key == runs.unsqueeze(-1)).unsqueeze(2)
