import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d
from kernels.glu import glu
from kernels.rmsnorm import rms_norm
from kernels.ssd import ssd
from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, output_projection
from nn.ssm.common import StateSpace, check_taps, negative_exp, refuse_encoder, set_steps, set_taps

# B batch, T time, C model dim, E = expand C channels, H heads of P channels, G groups of heads, N state, W taps


class Mamba2(StateSpace):
    """State space duality: a selective recurrence with one decay a head, which is attention with a decaying mask.

    Dao and Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), sections 6 and 7:

        z, u, d = split(W_up x);  X, B_t, C_t = split(silu(conv(u)))     all at once, so that no layer waits for another
        d_t = softplus(d + dt_bias)                                      a step size a head
        h_t = exp(d_t A) h_{t-1} + d_t X_t B_t^T                         (P, N) a head; A = -exp(A_log), one number
        y_t = W_out norm((h_t C_t + D X_t) silu(z_t))

    The heads of a group share B_t and C_t, and the norm is of the channels of a group. `head_dim` is 64, or E where that
    is less. `dt_min` and `dt_max` bound the step sizes. A begins uniform in [-16, -1], D with 1, step sizes between 0.001
    and 0.1.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is (W - 1) (E + 2 G N) + E N numbers whatever the length.
    ValueError if asked to see what follows (causal=False).
    """

    elementwise = ("taps",)

    def __init__(
        self,
        dim: int,
        *,
        state: int = 128,
        head_dim: int | None = None,
        expand: int = 2,
        groups: int = 1,
        conv: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        dt_min: float = 0.0,
        dt_max: float = math.inf,
        eps: float = 1e-5,
    ):
        super().__init__()
        at_least(1, state=state, head_dim=head_dim, expand=expand, groups=groups)
        at_least(0, dt_min=dt_min, eps=eps)
        at_least(dt_min, dt_max=dt_max)
        check_taps(conv)
        self.inner = expand * dim
        self.head_dim = head_dim or min(64, self.inner)
        if self.inner % self.head_dim:
            raise ValueError(f"head_dim: {self.inner} channels do not divide into heads of {self.head_dim}")
        self.heads = self.inner // self.head_dim
        if self.heads % groups:
            raise ValueError(f"groups: {self.heads} heads cannot be shared among {groups} groups evenly")
        self.state, self.groups, self.conv, self.eps = state, groups, conv, eps
        self.dt_min, self.dt_max = dt_min, dt_max
        self.mixed = self.inner + 2 * groups * state  # channels of the convolution: X, B and C
        self.up = Linear(dim, self.inner + self.mixed + self.heads, bias=bias)
        self.up.parts = (self.inner, self.inner, groups * state, groups * state, self.heads)  # z, X, B, C, d
        self.taps = nn.Parameter(torch.empty(self.mixed, conv))
        self.taps_bias = nn.Parameter(torch.empty(self.mixed)) if conv_bias else None
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(self.inner))
        self.out = output_projection(self.inner, dim, bias=bias)
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        """The initial values that belong to the equation, whatever the initialisation of the other weights."""
        set_taps(self.taps, self.taps_bias, generator)
        set_steps(self.dt_bias, generator)
        self.A_log.uniform_(1, 16, generator=generator).log_()
        self.D.fill_(1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        refuse_encoder(context)
        z, u, d = self.up(x).split([self.inner, self.mixed, self.heads], -1)  # (B, T, E), (B, T, E + 2 G N), (B, T, H)
        return self.out(self.normed(glu(z, self.scan(u, d, context), activation="silu")))

    def scan(self, u: Tensor, d: Tensor, context: Context) -> Tensor:
        """(B, T, E): h_t C_t + D X_t, of X, B and C before the convolution, u (B, T, E + 2 G N), and d (B, T, H)."""
        state, documents, G = context.state, context.documents, self.groups
        before, h = (None, None) if state is None else (state.inputs.to(u.dtype), state.h)
        u, last = causal_conv1d(u, self.taps, self.taps_bias, activation="silu", initial_state=before, documents=documents)
        X, B, C = u.split([self.inner, G * self.state, G * self.state], -1)
        X, B, C = X.unflatten(-1, (self.heads, -1)), B.unflatten(-1, (G, -1)), C.unflatten(-1, (G, -1))  # (B, T, ·, ·)
        options = dict(dt_bias=self.dt_bias, dt_softplus=True)
        if self.dt_min > 0 or self.dt_max < math.inf:
            d = d.to(torch.promote_types(d.dtype, torch.float32)) + self.dt_bias
            d, options = F.softplus(d).clamp(self.dt_min, self.dt_max), {}
        y, h = ssd(X, d, negative_exp(self.A_log), B, C, self.D, initial_state=h, documents=documents, **options)
        if state is not None:
            state.update(last, h)
        return y.flatten(2)

    def normed(self, y: Tensor) -> Tensor:
        """(B, T, E), the channels of each group with a root mean square of 1, times the gain."""
        if self.groups == 1:
            return rms_norm(y, self.gain, eps=self.eps)
        return rms_norm(y.unflatten(-1, (self.groups, -1)), eps=self.eps).flatten(2) * self.gain

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (batch, self.conv - 1, self.mixed), (batch, self.heads, self.head_dim, self.state)

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of convolution and recurrence, beside those of the projections; its form as products takes more."""
        return 2 * queries * (self.mixed * self.conv + 3 * self.inner * self.state)
