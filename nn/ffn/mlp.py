from typing import Literal

import torch
from torch import Tensor, nn

from kernels.glu import STAR, activate
from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, output_projection


class MLP(nn.Module):
    """Two linear layers with a pointwise nonlinearity between them: W2 f(W1 x).

    f is GELU by default (Hendrycks and Gimpel 2016, arXiv:1606.08415; `gelu_tanh` is the approximation GPT-2 uses), or
    `relu2`, the squared ReLU of Primer (So et al. 2021, arXiv:2109.08668), or `star_relu`, s relu(x)^2 + b with two learned
    numbers, which at first give mean 0 and variance 1 to normal x (Yu et al. 2022, "MetaFormer Baselines for Vision",
    arXiv:2210.13452). `width` defaults to 4 dim.
    Shapes: (B, T, dim) -> (B, T, dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "star_relu", "silu"] = "gelu",
        bias: bool = False,
    ):
        super().__init__()
        at_least(1, width=width)
        self.up = Linear(dim, width or 4 * dim, bias=bias)
        self.activation = activation
        self.scale = self.shift = None
        if activation == "star_relu":
            self.scale, self.shift = (nn.Parameter(torch.tensor(value)) for value in STAR)
        self.down = output_projection(width or 4 * dim, dim, bias=bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.down(activate(self.up(x), self.scale, self.shift, activation=self.activation))
