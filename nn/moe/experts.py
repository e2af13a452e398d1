from typing import Literal

import torch
from torch import Tensor, nn

from kernels.glu import activate, glu
from kernels.group_products import Dealt
from kernels.grouped_matmul import fused, grouped_matmul
from kernels.launch import apply
from nn.checks import at_least
from nn.linear import cast_once
from nn.moe.routing import counts_of

# N tokens, K choices a token, E experts, M = N K choices

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity"]
GATED = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "identity")
PLAIN = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


class StackedLinear(nn.Module):
    """A linear layer an expert, without biases: weight (E, out, in). It multiplies rows that stand sorted by expert.

    `uses`: how many of them a token goes through, for those who count operations. `gradient`: what is multiplied to the
    gradient of the weight, and of nothing else.
    """

    adapter = None

    def __init__(
        self,
        experts: int,
        dim_in: int,
        dim_out: int,
        *,
        uses: int,
        writes_residual: bool = False,
        gradient: float = 1.0,
    ):
        super().__init__()
        self.in_features, self.out_features, self.uses, self.writes_residual = dim_in, dim_out, uses, writes_residual
        self.gradient = gradient
        self.weight = nn.Parameter(torch.empty(experts, dim_out, dim_in))
        nn.init.uniform_(self.weight, -(dim_in**-0.5), dim_in**-0.5)

    def forward(self, x: Tensor, ends: Tensor, **places) -> Tensor:
        x = cast_once(x)
        return grouped_matmul(x, self.learned().to(x.dtype), ends, **places)

    def learned(self) -> Tensor:
        """The weight, as gradients see it."""
        return self.weight if self.gradient == 1 else ScaledGradient.apply(self.weight, self.gradient)


class ScaledGradient(torch.autograd.Function):
    """x as it is, whose gradient is multiplied by a number on its way back."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Experts(nn.Module):
    """E feed-forward layers of one shape, of which each token goes through those chosen for it: W_down (f(W_gate x) * W_up x).

    Without `gated`, W_down f(W_up x). Choices are sorted by expert, three grouped products (kernels/grouped_matmul.py) gather
    tokens and scatter results, and the choices of a token are added up. Nothing is padded, nothing dropped. The stacks of
    matrices are layers of the class `linear`.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        width: int,
        *,
        activation: Activation = "silu",
        gated: bool = True,
        uses: int = 1,
        gradient: float = 1.0,
        linear: type[StackedLinear] = StackedLinear,
    ):
        super().__init__()
        at_least(1, experts=experts, width=width)
        if activation not in (known := GATED if gated else PLAIN):
            raise ValueError(f"activation: {'gated' if gated else 'plain'} experts know {', '.join(known)}, not {activation}")
        self.experts, self.activation = experts, activation
        options = dict(uses=uses, gradient=gradient)
        self.gate = linear(experts, dim, width, **options) if gated else None
        self.up = linear(experts, dim, width, **options)
        self.down = linear(experts, width, dim, writes_residual=True, **options)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x (N, dim), experts (N, K) int64 (E: none), weights (N, K) -> (N, dim)."""
        K, order = experts.shape[1], experts.flatten().argsort(stable=True)  # (M,): choices, sorted by expert
        ends = counts_of(experts, self.experts).cumsum(0)
        h = self.hidden(x, ends, gather=order, fan_out=K)
        return self.down(h, ends, scatter=order, fan_in=K, scale=weights.flatten()[order])

    def hidden(self, x: Tensor, ends: Tensor, **places) -> Tensor:
        """(M, width) of rows sorted by expert, or of tokens that `places` gathers."""
        x = cast_once(x)
        if places and not fused(x):  # once for both products; Triton's gather what they read
            x, places = apply(Dealt, x, places["gather"], places["fan_out"]), {}
        up = self.up(x, ends, **places)
        if self.gate is None:
            return activate(up, activation=self.activation)
        gate = self.gate(x, ends, **places)
        return gate * up if self.activation == "identity" else glu(gate, up, activation=self.activation)
