import torch
from torch import Tensor, nn

from nn.checks import at_least
from nn.norm.affine import affine, exactly


class CRMSNorm(nn.Module):
    """Compressed RMSNorm: that of a vector of zero mean whose last coordinate, minus the sum of the others, is left away.

    y = x / sqrt((sum(x^2) + sum(x)^2) / (dim + 1) + eps) * gain over the last axis. A pre-LN transformer whose stream of
    width dim + 1 has zero mean carries dim of its coordinates only and computes the same: `python -m models.convert_norm`.

    Jiang, Gu, Zhu, Pan 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers" (arXiv:2305.14858).
    Shapes: (…, dim) -> (…, dim), same dtype; dim is the compressed width. `gain` and `bias` are learned vectors.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, gain: bool = True, bias: bool = False):
        super().__init__()
        at_least(0, eps=eps)
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if gain else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        z = exactly(x)
        squares = z.square().sum(-1, keepdim=True) + z.sum(-1, keepdim=True).square()
        return affine(z * (squares / (self.dim + 1) + self.eps).rsqrt(), self.weight, self.bias, x.dtype)
