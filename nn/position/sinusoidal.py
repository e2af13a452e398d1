import math

import torch
from torch import Tensor

from nn.checks import at_least
from nn.context import Context
from nn.position.none import NoPosition


class SinusoidalPosition(NoPosition):
    """Fixed sines and cosines added to the embedding: PE[t, 2i] = sin(t w_i), PE[t, 2i+1] = cos(t w_i), w_i = theta^(-2i/dim).

    Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762), section 3.5. There the embeddings are first
    multiplied by sqrt(dim), so that the two are of one size; here the encoding is divided by it instead.
    """

    def __init__(self, dim: int, *, theta: float = 10000.0):
        super().__init__()
        at_least(1, theta=theta)
        if dim % 2:
            raise ValueError(f"dim: sinusoidal positions need an even dim, not {dim}")
        self.dim, self.theta = dim, theta

    def embed(self, x: Tensor, context: Context) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        frequency = self.theta ** (-torch.arange(0, self.dim, 2, device=x.device, dtype=exact) / self.dim)
        angle = context.positions.to(exact)[..., None] * frequency
        encoding = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2) / math.sqrt(self.dim)
        return x + encoding.to(x.dtype)
