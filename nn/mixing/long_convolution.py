import math
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d
from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, output_projection
from nn.monarch import circular_convolution, square_of_at_least
from nn.ssm.common import StateSpace, check_taps, set_taps, without_autocast
from nn.ssm.s4d import apart

# B batch, T time, C model dim, W taps of the short convolution, L lags of the long one, n points of a circle

WAVES = 16  # of the features of a lag, with wavelengths from 2 to twice the longest lag
HIDDEN = 32  # of the network that makes the filters of a lag


class LongConvolution(StateSpace):
    """Gated long convolution: y = W_out (x2 * (K conv (x1 * v) + D (x1 * v))), with a filter K a channel over L lags.

    Poli et al. 2023, "Hyena Hierarchy" (arXiv:2302.10866), of order 2, as M2 mixes a sequence (Fu et al. 2023, "Monarch
    Mixer", arXiv:2310.12109); H3 (Fu et al. 2022, arXiv:2212.14052) has state spaces for filters. x1, x2 and v are
    projections of x, each behind a causal convolution of `conv` taps. Filters are implicit, a function of the lag, so that
    the number of parameters does not grow with L:

        K_l = sqrt(1 - exp(-2 a)) exp(-a |l|) (W2 sin(W1 z_l + b1) + b2)
        z_l = cos and sin of l at 16 frequencies, those of wavelengths 2 … 2 L in even ratios

    a is learned, a number a channel, and begins with 1 / a from 1 to L, in even ratios. Our choices: the root, with which
    all channels begin with about the variance of what they read, these features, one hidden layer of 32.

    length    L, the longest lag and one: beyond it nothing is remembered, in a shorter sequence the rest is not used
    by        how it is summed: "fft", or "monarch", which takes the same transform as products of matrices

    Sums are in float32 at least. An encoder (causal=False) has lags from -(L - 1) on too, for which the network of the signed
    lag gives other filters; its short convolutions look back. Documents of a row are set apart into rows of their own.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is the last L - 1 of the x1 * v and the last W - 1 inputs of the
    short convolutions, (L - 1) C + 3 (W - 1) C numbers whatever the length.
    """

    elementwise = ("taps",)

    def __init__(self, dim: int, *, length: int = 1024, conv: int = 3, by: Literal["fft", "monarch"] = "fft"):
        super().__init__()
        at_least(1, length=length)
        check_taps(conv)
        self.dim, self.length, self.conv, self.by = dim, length, conv, by
        self.up = Linear(dim, 3 * dim, bias=False)
        self.taps = nn.Parameter(torch.empty(3 * dim, conv))
        self.waves, self.filters = nn.Linear(2 * WAVES, HIDDEN), nn.Linear(HIDDEN, dim)
        self.log_decay, self.D = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.out = output_projection(dim, dim)
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        """Taps and filters as the equations have them, whatever the initialisation of the other weights."""
        set_taps(self.taps, None, generator)
        self.waves.weight.normal_(std=2 / math.sqrt(WAVES), generator=generator)  # phases of standard deviation 2
        self.waves.bias.uniform_(-math.pi, math.pi, generator=generator)
        self.filters.weight.normal_(std=math.sqrt(2 / HIDDEN), generator=generator)
        self.filters.bias.zero_()
        self.log_decay.copy_(-torch.linspace(0, math.log(self.length), self.dim))
        self.D.fill_(1)

    def kernel(self, lags: Tensor) -> Tensor:
        """K (C, n) of n lags, in float32 at least."""
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        lags = lags.to(dtype)[:, None]
        ratios = torch.linspace(0, 1, WAVES, dtype=dtype, device=lags.device)
        angles = lags * math.pi * self.length**-ratios  # (n, WAVES)
        z = torch.cat([angles.cos(), angles.sin()], -1)
        decay = self.log_decay.to(dtype).exp()
        window = (-torch.expm1(-2 * decay)).sqrt() * torch.exp(-decay * lags.abs())  # (n, C)
        network = [self.waves.weight, self.waves.bias, self.filters.weight, self.filters.bias]
        W1, b1, W2, b2 = (parameter.to(dtype) for parameter in network)
        return (window * (torch.sin(z @ W1.mT + b1) @ W2.mT + b2)).mT

    def convolve(self, u: Tensor, causal: bool) -> Tensor:
        """K conv u (B, T, C), the circle being so long that what wraps around it meets only zeros."""
        T = u.shape[1]
        reach = max(1, min(T, self.length))  # lags below it have something to read
        n = T + reach - 1
        n = 2 ** (n - 1).bit_length() if self.by == "fft" else square_of_at_least(n)
        lags = torch.arange(reach, device=u.device)
        k = self.kernel(lags)
        if not causal:
            after = self.kernel(lags[1:] - reach)  # lags -(reach - 1) … -1 stand at the end of the circle
            k = torch.cat([k, k.new_zeros(len(k), n - 2 * reach + 1), after], 1)
        if self.by == "monarch":
            return circular_convolution(u.mT, k.to(u.dtype), n)[..., :T].mT
        spectrum = torch.fft.rfft(u.mT.contiguous(), n) * torch.fft.rfft(k.to(u.dtype), n)
        return torch.fft.irfft(spectrum, n)[..., :T].mT

    def forward(self, x: Tensor, context: Context) -> Tensor:
        state, documents, causal = context.state, context.documents, context.causal
        if state is not None and not causal:
            raise ValueError("causal: an encoder sees all tokens at once; it has no decoding state")
        projected = self.up(x)  # (B, T, 3 C)
        before = None if state is None else state.inputs.to(projected.dtype)
        mixed, last = causal_conv1d(projected, self.taps, initial_state=before, documents=documents)
        x1, x2, v = mixed.chunk(3, -1)
        u = (x1 * v).to(torch.promote_types(x.dtype, torch.float32))
        with without_autocast(x.device):
            if state is not None:
                y, recent = self.go_on(u, state.h.to(u.dtype))
                state.update(last, recent)
            elif documents is not None:
                rows, places = apart(documents)
                alone = u.new_zeros(int(rows.max()) + 1, int(places.max()) + 1, self.dim)
                y = self.convolve(alone.index_put((rows, places), u), causal)[rows, places]
            else:
                y = self.convolve(u, causal)
        y = y + self.D * u
        return self.out(x2 * y.to(x2.dtype))

    def go_on(self, u: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution of u (B, T, C) that follows the `recent` (B, L - 1, C), and what is recent after it."""
        T, u = u.shape[1], torch.cat([recent, u], 1)  # (B, L - 1 + T, C)
        if T == 1:
            k = self.kernel(torch.arange(self.length, device=u.device)).to(u.dtype)  # (C, L)
            y = torch.einsum("blc,cl->bc", u, k.flip(1)).unsqueeze(1)
        else:
            y = self.convolve(u, True)[:, self.length - 1 :]
        return y, u[:, T:]

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (batch, self.conv - 1, 3 * self.dim), (batch, self.length - 1, self.dim)

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of the short convolutions and of three transforms of 2 T real points (the filter's, there, back)."""
        n = 2 * queries
        transform = n * (5 * n.bit_length() // 2 if self.by == "fft" else 16 * math.isqrt(n))
        return self.dim * (6 * queries * self.conv + 3 * transform)
