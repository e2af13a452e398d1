import torch
from torch import Tensor, nn

from kernels.rmsnorm import rms_norm
from nn.checks import at_least


class RMSNorm(nn.Module):
    """Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * gain over the last axis.

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467).
    Shapes: (…, dim) -> (…, dim), same dtype. `gain` is a learned vector and can be left away.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, gain: bool = True):
        super().__init__()
        at_least(0, eps=eps)
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)
