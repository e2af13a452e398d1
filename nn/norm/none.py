import torch
from torch import Tensor, nn


class NoNorm(nn.Module):
    """No normalisation: y = x, for models whose norms were folded away, and to see what a norm is good for.

    Shapes: (…, dim) -> (…, dim), same dtype. Nothing is learned.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x

    def linear_form(self) -> tuple[Tensor, Tensor]:
        """(A, b) with y = A x + b: the identity, (dim, dim), and zeros, (dim,), float64."""
        return torch.eye(self.dim, dtype=torch.float64), torch.zeros(self.dim, dtype=torch.float64)
