import torch
from torch import Tensor, nn

from kernels.rmsnorm import rms_norm
from nn.checks import at_least


class RMSNorm(nn.Module):
    """Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * gain over the last axis.

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467).
    Shapes: (…, dim) -> (…, dim), same dtype. `gain` is a learned vector and can be left away; `bias` adds another, as
    LayerNorm has it (Jiang et al. 2023, arXiv:2305.14858, whose Pre-RMSNorm models keep both). With
    `offset` 1 the gain is 1 + weight, as in Gemma, and weight decay pulls it to 1.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, gain: bool = True, bias: bool = False, offset: float = 0.0):
        super().__init__()
        at_least(0, eps=eps)
        self.dim, self.eps, self.offset = dim, eps, offset
        self.weight = nn.Parameter(torch.full((dim,), 1 - offset)) if gain else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = rms_norm(x, self.weight, eps=self.eps, offset=self.offset)
        return y if self.bias is None else y + self.bias.to(y.dtype)
