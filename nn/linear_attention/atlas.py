import math
from collections import Counter
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn.checks import at_least
from nn.linear import Linear
from nn.linear_attention.delta import GatedDeltaNet, unit
from nn.linear_attention.omega_rule import in_window, omega_rule

MOST = 65_536  # features of a key: a memory has so many rows

# B batch, T time, C model dim, H heads, D key dim, N features of a key, V = D value dim, W taps, c tokens of the window


class Atlas(GatedDeltaNet):
    """A memory that learns to recall the last c tokens, not only the last: the Omega rule, of polynomial features of keys.

    Behrouz et al. 2025, "ATLAS: Learning to Optimally Memorize the Context at Test Time" (arXiv:2505.23735):

        M_t = a_t M_{t-1} - eta_t G_t,   G_t = sum_{i = t-c+1 .. t} gate_ti (M_{t-1} f(k_i) - v_i) f(k_i)^T
        y_t = W_out (silu(W_gate x_t) * norm(M_t f(q_t)))

    window    c; 1 is the gated delta rule, but that a_t M_{t-1} is corrected by what M_{t-1} recalls
    degree    f: all monomials of a unit vector of D numbers up to this degree, without the constant, each times a learned
              coefficient, and the whole of unit length again. N = binomial(D + degree, degree) - 1 features: D for degree
              1, D + D (D + 1) / 2 for 2. Coefficients begin with 1 / sqrt(b_1! … b_D!) for powers b, with which
              f(q).f(k) is, up to lengths, sum_p (q.k)^p / p!, the series of exp(q.k)
    inner     how G is followed: `gradient` as above (OmegaNet), or `muon` (ATLAS): eta_t NewtonSchulz5(S_t) in place of
              eta_t G_t, with S_t = theta_t S_{t-1} + G_t. Slower, because the steps wait for each other
    rate      the largest eta_t: 1, but 0.1 with muon, whose steps are of length 1 in every direction however small the error
              is. At 1 they overshoot by turns, and after 15 tokens a change of x comes back thousands of times as large

    q, k, v, a_t, conv and gate are those of `gated_delta`, here with values as wide as keys; eta_t / rate and theta_t are
    sigmoids of the token. Of the gates, which the paper has depend on the input, we choose: a sigmoid of token i, and
    where those of a window sum to more than 1, divided by that sum, so that no step overshoots whatever the keys.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is M and, with muon, S, H N V numbers each, the last c - 1 keys,
    values and gates, H (2 D + 1) each, and the last W - 1 inputs of the convolution, whatever the length.
    """

    elementwise = ("taps", "coefficients")

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        window: int = 16,
        degree: int = 2,
        inner: Literal["gradient", "muon"] = "gradient",
        rate: float | None = None,
        conv: int = 4,
        gate: bool = True,
        eps: float = 1e-5,
    ):
        at_least(1, window=window, degree=degree)
        at_least(0, rate=rate)
        rate = (0.1 if inner == "muon" else 1.0) if rate is None else rate
        super().__init__(dim, heads=heads, head_dim=head_dim, expand=1, conv=conv, beta_max=rate, gate=gate, eps=eps)
        self.window, self.inner = window, inner
        features = math.comb(self.key_dim + degree, degree) - 1
        if features > MOST:
            raise ValueError(f"degree: {features:,} features of keys of {self.key_dim}; at most {MOST:,}")
        powers = [m for p in range(1, degree + 1) for m in combinations_with_replacement(range(self.key_dim), p)]
        factors = [m + (self.key_dim,) * (degree - len(m)) for m in powers]  # D stands for a factor of 1
        factors = torch.tensor(factors, device="cpu").T.contiguous()  # numbers also for a model that is made without memory
        self.register_buffer("factors", factors, persistent=False)  # (degree, N)
        scale = [math.prod(map(math.factorial, Counter(m).values())) ** -0.5 for m in powers]
        self.coefficients = nn.Parameter(torch.tensor(scale).repeat(heads, 1))  # (H, N)
        self.keep = Linear(dim, heads, bias=False)
        self.momentum = Linear(dim, heads, bias=False) if inner == "muon" else None

    @property
    def together(self) -> tuple[str, ...]:
        return (*super().together, "keep", *(("momentum",) if self.momentum is not None else ()))

    def features(self, x: Tensor) -> Tensor:
        """f of x (B, T, H, D), as (B, T, H, N)."""
        x = F.pad(x, (0, 1), value=1.0)
        return unit(math.prod((x.index_select(-1, i) for i in self.factors), start=self.coefficients.to(x.dtype)))

    def remember(
        self, q: Tensor, k: Tensor, v: Tensor, made: dict[str, Tensor], state: "AtlasState | None", documents: Tensor | None
    ) -> Tensor:
        c, dtype, wide = self.window, v.dtype, torch.promote_types(v.dtype, torch.float32)
        q, k, v = (x.to(wide) for x in (q, k, v))
        gate = made["keep"].to(wide).sigmoid()
        if state is None:
            k, v, gate = (F.pad(x, (0, 0) * (x.ndim - 2) + (c - 1, 0)) for x in (k, v, gate))
        else:
            k, v, gate = (torch.cat(pair, 1) for pair in ((state.keys, k), (state.values, v), (state.gates, gate)))
        gates = in_window(gate, c, documents)  # (B, T, H, c)
        gates = gates / gates.sum(-1, keepdim=True).clamp(min=1)
        theta = None if self.momentum is None else made["momentum"].to(wide).sigmoid()
        before = None if state is None else (state.h, state.momentum)
        steps = (self.shares(made["beta"]), gates, self.decays(made), theta)
        o, (M, S) = omega_rule(self.features(q), self.features(k), v, *steps, initial_state=before, documents=documents)
        if state is not None:
            T = q.shape[1]
            state.update(h=M, momentum=S, keys=k[:, T:], values=v[:, T:], gates=gate[:, T:])
        return o.to(dtype)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> "AtlasState":
        kinds = self.kinds(batch, dtype).items()
        return AtlasState(**{name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in kinds})

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return sum(math.prod(shape) * kind.itemsize for shape, kind in self.kinds(batch, dtype).values())

    def kinds(self, batch: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the tensors of a decoding state."""
        wide, muon = torch.promote_types(dtype, torch.float32), self.inner == "muon"
        recent, exact = (batch, self.window - 1, self.heads), torch.float64 if muon else wide
        memory = (batch, self.heads, self.coefficients.shape[1], self.value_dim)
        return dict(
            inputs=((batch, *self.recent), dtype),
            h=(memory, exact),
            momentum=(memory if muon else (batch, 0), exact),
            keys=((*recent, self.key_dim), wide),
            values=((*recent, self.value_dim), wide),
            gates=(recent, wide),
        )

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of recurrence and convolution: the window recalled and written, M decayed and read, and Newton-Schulz."""
        taps, channels = self.recent
        N, V = self.coefficients.shape[1], self.value_dim
        step = 2 * (2 * self.window + 2) * N * V
        if self.inner == "muon":
            few, many = min(N, V), max(N, V)
            step += 5 * (4 * few * few * many + 2 * few**3) + 2 * N * V
        return queries * (self.heads * step + 2 * (taps + 1) * channels)


@dataclass
class AtlasState:
    """What decoding remembers: all but the inputs of the convolution in float32 at least, because it is used again and again.

    inputs (B, W - 1, channels); h, the memory M, (B, H, N, V), with muon in float64, as is its momentum S; of the last c - 1
    tokens the keys (B, c - 1, H, D), of which the features are made anew, values (B, c - 1, H, V) and gates (B, c - 1, H).
    """

    inputs: Tensor
    h: Tensor
    momentum: Tensor
    keys: Tensor
    values: Tensor
    gates: Tensor

    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())

    def update(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                getattr(self, name).copy_(tensor)
