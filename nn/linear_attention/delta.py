import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d
from kernels.glu import glu
from kernels.rmsnorm import rms_norm
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.linear_attention.delta_rule import delta_rule
from nn.linear_attention.memory import MatrixMemory, looks_back_only
from nn.ssm.common import SSMState, check_taps, negative_exp, set_steps, set_taps, without_autocast

# B batch, T time, C model dim, H heads, D key dim, V = expand D value dim, W taps


class DeltaNet(MatrixMemory):
    """The delta rule: before a value is written at a key, the share beta of what the memory holds there is taken out.

    Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (arXiv:2406.06484), after
    Schlag et al. 2021 (arXiv:2102.11174):

        q, k, v = silu(conv(W x))                             q and k then of unit length
        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T    beta_t = beta_max sigmoid(W_beta x_t)
        y_t = W_out norm(S_t^T q_t)                           each head alone, one gain for all

    conv       taps of the short convolution before the nonlinearity; 0 for none
    beta_max   2 lets a memory change its sign at a key (Grazzi et al. 2024, arXiv:2411.12537)
    gate       multiplies the normed output by silu(W_gate x_t)

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is H D V + (W - 1) H (2 D + V) numbers whatever the length.
    ValueError if asked to see what follows (causal=False).
    """

    elementwise = ("taps",)
    passes = 4  # decayed or looked up, erased, written, read
    gated = False

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        expand: int | None = None,
        conv: int = 4,
        beta_max: float = 1.0,
        gate: bool | None = None,
        eps: float = 1e-5,
    ):
        at_least(1, heads=heads, head_dim=head_dim, expand=expand)
        at_least(0, conv=conv, beta_max=beta_max, eps=eps)
        if conv:
            check_taps(conv)
        D = width_of_heads(dim, heads, head_dim)
        V = D * (expand or (2 if self.gated else 1))
        mixed = heads * (2 * D + V)  # channels of the convolution: queries, keys and values
        super().__init__(heads, D, V, taps=conv, channels=mixed)
        self.beta_max, self.eps = beta_max, eps
        self.query, self.key = (Linear(dim, heads * D, bias=False) for _ in range(2))
        self.value, self.beta = Linear(dim, heads * V, bias=False), Linear(dim, heads, bias=False)
        self.gate = Linear(dim, heads * V, bias=False) if (self.gated if gate is None else gate) else None
        self.taps = nn.Parameter(torch.empty(mixed, conv)) if conv else None
        if self.gated:
            self.decay = Linear(dim, heads, bias=False)
            self.dt_bias, self.A_log = (nn.Parameter(torch.empty(heads)) for _ in range(2))
        self.gain = nn.Parameter(torch.ones(V))
        self.out = output_projection(heads * V, dim)
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        """The initial values that belong to the equation, whatever the initialisation of the other weights."""
        if self.taps is not None:
            set_taps(self.taps, None, generator)
        if self.gated:
            set_steps(self.dt_bias, generator)
            self.A_log.uniform_(1, 16, generator=generator).log_()

    @property
    def together(self) -> tuple[str, ...]:
        return ("query", "key", "value", "beta") + ("gate",) * (self.gate is not None) + ("decay",) * self.gated

    def forward(self, x: Tensor, context: Context) -> Tensor:
        looks_back_only(context)
        state, documents = context.state, context.documents
        made = dict(zip(self.together, project(x, *(getattr(self, name) for name in self.together)), strict=True))
        u, last = torch.cat([made["query"], made["key"], made["value"]], -1), None  # (B, T, H (2 D + V))
        if self.taps is None:
            u = F.silu(u)
        else:
            before = None if state is None else state.inputs.to(u.dtype)
            u, last = causal_conv1d(u, self.taps, activation="silu", initial_state=before, documents=documents)
        inner = self.heads * self.key_dim
        q, k, v = self.heads_of(*u.split([inner, inner, self.heads * self.value_dim], -1))
        with without_autocast(x.device):
            o = self.remember(unit(q), unit(k), v, made, state, documents)
        if state is not None and last is not None:
            state.inputs.copy_(last)
        o = rms_norm(o, self.gain, eps=self.eps).flatten(2)
        return self.out(o if self.gate is None else glu(made["gate"], o, activation="silu"))

    def remember(
        self, q: Tensor, k: Tensor, v: Tensor, made: dict[str, Tensor], state: SSMState | None, documents: Tensor | None
    ) -> Tensor:
        """o (B, T, H, V) of q and k (B, T, H, D), v (B, T, H, V) and what else is made of x; the state goes on."""
        options = dict(initial_state=None if state is None else state.h, documents=documents)
        o, h = delta_rule(q, k, v, self.shares(made["beta"]), self.decays(made), **options)
        if state is not None:
            state.h.copy_(h)
        return o

    def shares(self, beta: Tensor) -> Tensor:
        """beta_t (B, T, H), in float32 at least."""
        return self.beta_max * beta.to(torch.promote_types(beta.dtype, torch.float32)).sigmoid()

    def decays(self, made: dict[str, Tensor]) -> Tensor | None:
        """g_t (B, T, H), the logarithm of what is kept of the memory before it is written to; None where all is."""
        return None


class GatedDeltaNet(DeltaNet):
    """The delta rule in a memory that also forgets: all of it decays, by a number a head that the token chooses.

    Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv:2412.06464), section 3:

        S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T
        a_t = exp(-exp(A_log) softplus(W_a x_t + dt_bias))    as in `mamba2`

    Otherwise as `delta`, with the gate and with values twice as wide as keys unless the options say. A begins uniform in
    [1, 16], step sizes between 0.001 and 0.1.
    """

    gated = True

    def decays(self, made: dict[str, Tensor]) -> Tensor:
        step = made["decay"].to(torch.promote_types(made["decay"].dtype, torch.float32)) + self.dt_bias
        return negative_exp(self.A_log) * F.softplus(step)


def unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) over the last axis."""
    D = x.shape[-1]
    return rms_norm(x, eps=1e-6 / D) * D**-0.5
