import torch
from torch import Tensor, nn

from kernels.layernorm import layer_norm
from nn.checks import at_least


class LayerNorm(nn.Module):
    """Layer normalisation: y = (x - mean) / sqrt(var + eps) * gain + bias over the last axis.

    Ba, Kiros, Hinton 2016, "Layer Normalization" (arXiv:1607.06450).
    Shapes: (…, dim) -> (…, dim), same dtype. `gain` and `bias` are learned vectors; either can be left away.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, gain: bool = True, bias: bool = True):
        super().__init__()
        at_least(0, eps=eps)
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if gain else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)
