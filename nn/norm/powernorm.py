from collections.abc import Callable

import torch
from torch import Tensor, nn

from nn.checks import at_least
from nn.norm.affine import affine, exactly


class Divide(torch.autograd.Function):
    """h = x / psi by feature; its gradient is (g - nu h) / psi, with nu = coefficient(g, h) asked for in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, psi: Tensor, coefficient: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        h = x / psi
        ctx.save_for_backward(h, psi)
        ctx.coefficient = coefficient
        return h

    @staticmethod
    def backward(ctx, g: Tensor):
        h, psi = ctx.saved_tensors
        return (g - ctx.coefficient(g, h) * h) / psi, None, None


def tokens_mean(x: Tensor) -> Tensor:
    """(…, dim) -> (dim,): the mean over all tokens."""
    return x.flatten(0, -2).mean(0) if x.ndim > 1 else x


class PowerNorm(nn.Module):
    """Division of each feature by a running root mean square over batch and time; the mean is not subtracted.

        forward    h = x / psi,  y = h gain + bias          then psi^2 += (1 - decay) (mean(x^2) - psi^2)
        backward   g = dy gain,  dx = (g - nu h) / psi      then nu += (1 - decay) (mean(g h) - nu mean(h^2))

    Means run over all tokens of the batch, by feature; eps is added to psi^2 where it divides. The gradient approximates:
    nu, a running statistic, stands for mean(g h), which would be exact if psi were that of the batch. In the first `warmup`
    steps psi and nu are those of the batch and the gradient is exact ("PN-V"). Statistics move in training mode where
    gradients are recorded; elsewhere psi is fixed, a token's output depends on that token alone, and the norm folds into
    the next linear layer.

    During the warmup a token's output depends on the batch, later tokens too: a causal model leaks, so its training loss of
    these steps is no measure of it. The group scaling of the authors' code before the norm is left away: it is a norm of its
    own that does not fold. A warmup of 100 steps suits short runs and is a choice (the authors take 4,000 to 10,000).

    Shen et al. 2020, "PowerNorm: Rethinking Batch Normalization in Transformers" (arXiv:2003.07845).
    Shapes: (…, dim) -> (…, dim), same dtype. The buffers (mean_square and nu, (dim,); steps, ()) are part of a checkpoint.
    """

    per_token = False  # in training

    def __init__(
        self, dim: int, *, decay: float = 0.9, eps: float = 1e-5, warmup: int = 100, gain: bool = True, bias: bool = True
    ):
        super().__init__()
        at_least(0, eps=eps, warmup=warmup)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: {decay} does not lie in [0, 1)")
        self.dim, self.decay, self.eps, self.warmup = dim, decay, eps, warmup
        self.weight = nn.Parameter(torch.ones(dim)) if gain else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.register_buffer("mean_square", torch.ones(dim))
        self.register_buffer("nu", torch.zeros(dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        z = exactly(x)
        if self.training and torch.is_grad_enabled() and x.numel():
            h = Divide.apply(z, *self.statistics(z.detach()))
        else:
            h = z / self.psi(self.mean_square)
        return affine(h, self.weight, self.bias, x.dtype)

    def psi(self, mean_square: Tensor) -> Tensor:
        return (exactly(mean_square) + self.eps).sqrt()

    @torch.no_grad()
    def statistics(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """psi of this step, (dim,), and the function of (g, h) that gives nu and moves its average."""
        batch, warm = tokens_mean(x.square()), self.steps < self.warmup
        psi = self.psi(torch.where(warm, batch, self.mean_square.to(batch.dtype)))
        move(self.mean_square, batch - self.mean_square, 1 - self.decay)
        self.steps += 1

        def coefficient(g: Tensor, h: Tensor) -> Tensor:
            gh = tokens_mean(g * h)
            nu = torch.where(warm, gh, self.nu.to(g.dtype))
            move(self.nu, gh - self.nu * tokens_mean(h.square()), 1 - self.decay)
            return nu

        return psi, coefficient

    def linear_form(self) -> tuple[Tensor, Tensor]:
        """(A, b) with y = A x + b outside of training: (dim, dim) and (dim,), float64."""
        psi = (self.mean_square.double() + self.eps).sqrt()
        gain, bias = (default if p is None else p.detach().double()
                      for p, default in ((self.weight, torch.ones_like(psi)), (self.bias, torch.zeros_like(psi))))  # fmt: skip
        return torch.diag(gain / psi), bias


def move(buffer: Tensor, step: Tensor, rate: float) -> None:
    buffer.add_(step.to(buffer.dtype), alpha=rate)
