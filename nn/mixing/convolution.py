import torch
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d
from kernels.glu import STAR, activate
from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, output_projection

# B batch, T time, C model dim, E = expand C inner channels, W taps


class ConvMixer(nn.Module):
    """Inverted separable convolution: y = W_down conv(star_relu(W_up x)), conv depthwise over the last W tokens.

    Yu et al. 2022, "MetaFormer Baselines for Vision" (arXiv:2210.13452), ConvFormer, after MobileNetV2 (Sandler et al.
    2018, arXiv:1801.04381). star_relu(x) = s relu(x)^2 + b with s and b learned, from 0.8944 and -0.4472 on, which give
    mean 0 and variance 1 to normal x. Our adaptation: one axis of 2 to 8 taps in place of 7 x 7, and they look back only.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is the last W - 1 inputs of the convolution, (W - 1) E numbers
    whatever the length. ValueError if asked to see what follows (causal=False).
    """

    elementwise = ("taps",)

    def __init__(self, dim: int, *, width: int = 7, expand: int = 2):
        super().__init__()
        at_least(1, expand=expand)
        if not 2 <= width <= 8:
            raise ValueError(f"width: 2 to 8 taps, not {width}")
        self.inner, self.width = expand * dim, width
        self.up = Linear(dim, self.inner, bias=False)
        self.star_scale, self.star_bias = (nn.Parameter(torch.tensor([value])) for value in STAR)
        self.taps = nn.Parameter(torch.empty(self.inner, width))
        self.down = output_projection(self.inner, dim)
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        """Taps uniform within 1 / sqrt(W), whatever the initialisation of the other weights."""
        nn.init.uniform_(self.taps, -(self.width**-0.5), self.width**-0.5, generator=generator)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not context.causal:
            raise ValueError("causal: this convolution looks back only")
        h = activate(self.up(x), self.star_scale, self.star_bias, activation="star_relu")  # (B, T, E)
        state = context.state
        before = None if state is None else state.last.to(h.dtype)
        y, last = causal_conv1d(h, self.taps, initial_state=before, documents=context.documents)
        if state is not None:
            state.last.copy_(last)
        return self.down(y)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> "RecentInputs":
        return RecentInputs(torch.zeros(batch, self.width - 1, self.inner, dtype=dtype, device=device))

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return batch * (self.width - 1) * self.inner * dtype.itemsize

    def mixing_flops(self, queries: int, keys: int) -> int:
        return 2 * queries * self.width * self.inner


class RecentInputs:
    """The last inputs of a convolution, (B, W - 1, E), oldest first; zeros before the first."""

    def __init__(self, last: Tensor):
        self.last = last

    def bytes(self) -> int:
        return self.last.nbytes
