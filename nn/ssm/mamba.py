import math

import torch
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d
from kernels.rmsnorm import rms_norm
from kernels.selective_scan import selective_scan
from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, output_projection
from nn.ssm.common import StateSpace, check_taps, negative_exp, refuse_encoder, set_steps, set_taps

# B batch, T time, C model dim, E = expand C channels, N state, R dt_rank, W taps


class Mamba(StateSpace):
    """Selective state space: a diagonal recurrence whose step size, input and output are chosen by the token.

    Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv:2312.00752), algorithm 2
    and section 3.4:

        u, z = split(W_up x);  u = silu(conv(u))             W taps looking back, each channel alone
        r, B_t, C_t = split(W_select u)
        d_t = softplus(W_dt r + dt_bias)                     a step size a channel
        h_t = exp(d_t A) h_{t-1} + d_t B_t u_t               N numbers a channel; A = -exp(A_log)
        y_t = W_out ((C_t . h_t + D u_t) silu(z_t))

    `dt_rank` is dim / 16, rounded up, unless given. `inner_norm` gives r, B_t and C_t unit root mean square, without a
    gain, as in FalconMamba (Zuo et al. 2024, arXiv:2410.05355). A begins with -1 … -N (S4D-Real, arXiv:2206.11893), D with
    1, step sizes between 0.001 and 0.1.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is (W - 1 + N) E numbers whatever the length. ValueError if asked
    to see what follows (causal=False): `bimamba` does.
    """

    elementwise = ("taps", "A_log")

    def __init__(
        self,
        dim: int,
        *,
        state: int = 16,
        expand: int = 2,
        conv: int = 4,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        inner_norm: bool = False,
    ):
        super().__init__()
        at_least(1, state=state, expand=expand, dt_rank=dt_rank)
        check_taps(conv)
        self.inner, self.state, self.conv, self.inner_norm = expand * dim, state, conv, inner_norm
        self.dt_rank = dt_rank or math.ceil(dim / 16)
        self.up = Linear(dim, 2 * self.inner, bias=bias)
        self.taps = nn.Parameter(torch.empty(self.inner, conv))
        self.taps_bias = nn.Parameter(torch.empty(self.inner)) if conv_bias else None
        self.select = Linear(self.inner, self.dt_rank + 2 * state, bias=False)
        self.up.parts, self.select.parts = (self.inner, self.inner), (self.dt_rank, state, state)
        self.dt = Linear(self.dt_rank, self.inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.inner))
        self.A_log = nn.Parameter(torch.empty(self.inner, state))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out = output_projection(self.inner, dim, bias=bias)
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        """The initial values that belong to the equation, whatever the initialisation of the other weights."""
        set_taps(self.taps, self.taps_bias, generator)
        nn.init.uniform_(self.dt.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5, generator=generator)
        set_steps(self.dt_bias, generator)
        self.A_log.copy_(torch.arange(1, self.state + 1).log())
        self.D.fill_(1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        refuse_encoder(context)
        state, documents = context.state, context.documents
        u, z = self.up(x).chunk(2, -1)  # (B, T, E) each
        before, h = (None, None) if state is None else (state.inputs.to(u.dtype), state.h)
        u, last = causal_conv1d(u, self.taps, self.taps_bias, activation="silu", initial_state=before, documents=documents)
        r, B, C = self.select(u).split([self.dt_rank, self.state, self.state], -1)  # (B, T, R), (B, T, N), (B, T, N)
        if self.inner_norm:
            r, B, C = rms_norm(r), rms_norm(B), rms_norm(C)
        y, h = selective_scan(
            u, self.dt(r), negative_exp(self.A_log), B, C, self.D, z,
            delta_bias=self.dt_bias, delta_softplus=True, initial_state=h, documents=documents,
        )  # fmt: skip
        if state is not None:
            state.update(last, h)
        return self.out(y)

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (batch, self.conv - 1, self.inner), (batch, self.inner, self.state)

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of convolution and scan, beside those of the projections."""
        return 2 * queries * self.inner * (self.conv + 3 * self.state)
