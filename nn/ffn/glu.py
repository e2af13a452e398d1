from typing import Literal

from torch import Tensor, nn

from kernels.glu import glu
from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, output_projection, project


class GLU(nn.Module):
    """A gated feed-forward layer: W_down (f(W_gate x) * W_up x), with f the sigmoid by default.

    Dauphin et al. 2016 (arXiv:1612.08083); Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202). `width`
    defaults to 8/3 dim rounded up to a multiple of 64, which gives it the parameters of an MLP of width 4 dim.
    Shapes: (B, T, dim) -> (B, T, dim).
    """

    together = ("gate", "up")

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        activation: Literal["sigmoid", "silu", "gelu", "gelu_tanh", "relu", "identity"] = "sigmoid",
        bias: bool = False,
    ):
        super().__init__()
        at_least(1, width=width)
        width = width or -(-8 * dim // (3 * 64)) * 64
        self.activation = activation
        self.gate = Linear(dim, width, bias=bias)
        self.up = Linear(dim, width, bias=bias)
        self.down = output_projection(width, dim, bias=bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        gate, up = project(x, self.gate, self.up)
        return self.down(gate * up if self.activation == "identity" else glu(gate, up, activation=self.activation))


class SwiGLU(GLU):
    """The gated layer whose gate is silu, as in PaLM and Llama. Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, dim: int, *, width: int | None = None, bias: bool = False):
        super().__init__(dim, width=width, activation="silu", bias=bias)


class GeGLU(GLU):
    """The gated layer whose gate is GELU (`approximate`: its tanh form, as in Gemma). Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, dim: int, *, width: int | None = None, approximate: bool = False, bias: bool = False):
        super().__init__(dim, width=width, activation="gelu_tanh" if approximate else "gelu", bias=bias)


class SGLU(GLU):
    """The gated layer without a nonlinearity: a product of two linear maps. Qin et al. 2023 (arXiv:2307.14995), section 3.1.

    Also known as the bilinear layer of Shazeer 2020 (arXiv:2002.05202).
    """

    def __init__(self, dim: int, *, width: int | None = None, bias: bool = False):
        super().__init__(dim, width=width, activation="identity", bias=bias)
