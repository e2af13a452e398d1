import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d
from kernels.glu import glu
from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, output_projection
from nn.ssm.common import StateSpace, check_taps, negative_exp, refuse_encoder, set_steps, set_taps, without_autocast

# B batch, T time, C model dim, E = expand C channels, N state, W taps


class S4D(StateSpace):
    """Diagonal state space that does not select: the block of `mamba` with constants in place of what the token chooses.

    Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv:2206.11893), in the
    block of Gu and Dao 2023 (arXiv:2312.00752, algorithm 1 in place of algorithm 2): what Mamba gains over it, selection
    gains. Each channel has a step size d and N numbers each in A, B and C:

        h_t = exp(d A) h_{t-1} + d B u_t,   y_t = C . h_t + D u_t

    Because they are constants this is a convolution, y = K * u with K_k = sum_n C exp(k d A) d B, and is done as one, by
    FFT: on a CPU 1.5 to 3 times as fast as the scan for 256 to 1024 tokens. What an earlier state adds to y_t
    is C exp((t + 1) d A) h. Documents of a row are set apart into rows of their own first.

    A is real and begins with -1 … -N ("S4D-Real"), B with 1, C normal, D with 1, step sizes between 0.001 and 0.1.
    Shapes: x (B, T, C) -> (B, T, C). The decoding state is (W - 1 + N) E numbers whatever the length. ValueError if asked
    to see what follows (causal=False).
    """

    elementwise = ("taps", "A_log", "B", "C")

    def __init__(
        self, dim: int, *, state: int = 16, expand: int = 2, conv: int = 4, bias: bool = False, conv_bias: bool = True
    ):
        super().__init__()
        at_least(1, state=state, expand=expand)
        check_taps(conv)
        self.inner, self.state, self.conv = expand * dim, state, conv
        self.up = Linear(dim, 2 * self.inner, bias=bias)
        self.taps = nn.Parameter(torch.empty(self.inner, conv))
        self.taps_bias = nn.Parameter(torch.empty(self.inner)) if conv_bias else None
        self.dt_bias, self.D = (nn.Parameter(torch.empty(self.inner)) for _ in range(2))
        self.A_log, self.B, self.C = (nn.Parameter(torch.empty(self.inner, state)) for _ in range(3))
        self.out = output_projection(self.inner, dim, bias=bias)
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        """The initial values that belong to the equation, whatever the initialisation of the other weights."""
        set_taps(self.taps, self.taps_bias, generator)
        set_steps(self.dt_bias, generator)
        self.A_log.copy_(torch.arange(1, self.state + 1).log())
        self.B.fill_(1)
        self.C.normal_(generator=generator)
        self.D.fill_(1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        refuse_encoder(context)
        state, documents = context.state, context.documents
        u, z = self.up(x).chunk(2, -1)  # (B, T, E) each
        before = None if state is None else state.inputs.to(u.dtype)
        u, last = causal_conv1d(u, self.taps, self.taps_bias, activation="silu", initial_state=before, documents=documents)
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        with without_autocast(x.device):
            if documents is None:
                y, h = self.convolve(wide, None if state is None else state.h)
            else:
                rows, places = apart(documents)
                alone = wide.new_zeros(int(rows.max()) + 1, int(places.max()) + 1, self.inner)
                y = self.convolve(alone.index_put((rows, places), wide), None)[0][rows, places]
        if state is not None:
            state.update(last, h)
        y = y + self.D * wide
        return self.out(glu(z, y.to(z.dtype), activation="silu"))

    def convolve(self, u: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """y (B, T, E) of u (B, T, E) without D, and the state (B, E, N) after them where there is one before them."""
        T = u.shape[1]
        step = F.softplus(self.dt_bias.to(u.dtype))[:, None]  # (E, 1)
        decay, into = step * negative_exp(self.A_log), step * self.B  # (E, N) each
        points = max(2, 2 * T)  # twice the length: the end of a circle must not reach its start
        y = torch.fft.rfft(u.mT.contiguous(), points) * torch.fft.rfft(kernel(decay, into * self.C, T), points)
        y = torch.fft.irfft(y, points)[..., :T].mT
        if h is None:
            return y, None
        powers = torch.exp(torch.arange(T + 1, device=u.device)[:, None, None] * decay)  # (T + 1, E, N)
        y = y + torch.einsum("ben,ten->bte", h, powers[1:] * self.C)
        return y, powers[T] * h + torch.einsum("bte,ten->ben", u, powers[:T].flip(0) * into)

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (batch, self.conv - 1, self.inner), (batch, self.inner, self.state)

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of the short convolution and of the two FFTs of 2 T real points each, 2.5 n log2 n."""
        return queries * self.inner * (2 * self.conv + 10 * (2 * queries).bit_length())


def kernel(decay: Tensor, weight: Tensor, T: int) -> Tensor:
    """sum_n weight exp(k decay) for k < T, (E, T), of decay and weight (E, N).

    With k = i L + j each power is a product of two, so that few exponentials are taken, and the sum is a product of matrices.
    """
    L = max(1, math.isqrt(T))
    near, far = (torch.arange(count, device=decay.device) for count in (L, -(-T // L)))
    near, far = torch.exp(decay[..., None] * near), torch.exp(decay[..., None] * (L * far))  # (E, N, L), (E, N, T / L)
    return ((weight[..., None] * far).mT @ near).flatten(1)[:, :T]


def apart(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token (B, T) its document's number, counted over all rows, and its place in it."""
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    at = torch.arange(documents.shape[1], device=documents.device)
    return begins.flatten().cumsum(0).view_as(begins) - 1, at - (begins * at).cummax(1).values
