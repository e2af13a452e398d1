from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, output_projection


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2, of which autograd would make twice the passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (positive * dy).mul_(2)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": SquaredReLU.apply,
    "silu": F.silu,
}


class MLP(nn.Module):
    """Two linear layers with a pointwise nonlinearity between them: W2 f(W1 x).

    f is GELU by default (Hendrycks and Gimpel 2016, arXiv:1606.08415; `gelu_tanh` is the approximation GPT-2 uses), or
    `relu2`, the squared ReLU of Primer (So et al. 2021, arXiv:2109.08668). `width` defaults to 4 dim.
    Shapes: (B, T, dim) -> (B, T, dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"] = "gelu",
        bias: bool = False,
    ):
        super().__init__()
        at_least(1, width=width)
        self.up = Linear(dim, width or 4 * dim, bias=bias)
        self.activation_name = activation
        self.down = output_projection(width or 4 * dim, dim, bias=bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.down(ACTIVATIONS[self.activation_name](self.up(x)))
