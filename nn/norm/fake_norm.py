import torch
from torch import Tensor, nn

from nn.checks import at_least
from nn.norm.affine import affine, exactly


class FakeNorm(nn.Module):
    """LayerNorm that can be taken out of a trained model: its division becomes one by a constant.

        y = (x - mean(x)) / spread * gain + bias,   spread = sqrt(var(x) + eps), a number a token, and after `remove()`
                                                    spread = sigma, one number for all

    Until then sigma follows the mean of spread over all tokens, in training mode where gradients are recorded: a plain mean
    of the first steps that turns into a running one of weight 1 - `decay`. Afterwards y is linear in x and folds into the
    next linear layer: `python -m models.fold_norm`. `models.remove_norms` takes a model's norms out one after the other.

    Baroni et al. 2025, "Transformers Don't Need LayerNorm at Inference Time" (arXiv:2507.02559). The paper's second
    constant, for position 0, is left away: a norm does not know positions (a step of decoding looks like position 0), and
    two constants are not one linear map. `decay` is a choice.

    Shapes: (…, dim) -> (…, dim), same dtype. The buffers (sigma, steps, removed, all ()) are part of a checkpoint.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, decay: float = 0.99, gain: bool = True, bias: bool = True):
        super().__init__()
        at_least(0, eps=eps)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: {decay} does not lie in [0, 1)")
        self.dim, self.eps, self.decay = dim, eps, decay
        self.weight = nn.Parameter(torch.ones(dim)) if gain else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.register_buffer("sigma", torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("removed", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        z = exactly(x)
        centred = z - z.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()  # (…, 1)
        if self.training and torch.is_grad_enabled() and x.numel():
            self.follow(spread.detach().mean())
        spread = torch.where(self.removed, self.sigma.to(spread.dtype), spread)
        return affine(centred / spread, self.weight, self.bias, x.dtype)

    @torch.no_grad()
    def follow(self, spread: Tensor) -> None:
        """Move sigma towards the mean spread of a batch, unless it is frozen."""
        self.steps += ~self.removed
        rate = torch.where(self.removed, 0.0, (1 / self.steps.to(spread.dtype)).clamp(min=1 - self.decay))
        self.sigma += (rate * (spread - self.sigma)).to(self.sigma.dtype)

    def remove(self, sigma: float | None = None) -> None:
        """From now on divide by a constant: by `sigma`, or else by the mean that was followed; it stays as it is."""
        if sigma is None and not self.steps:
            raise ValueError("sigma: the norm has seen no training batch to take it from")
        if sigma is not None:
            if not sigma > 0:
                raise ValueError(f"sigma: {sigma} is not above 0")
            self.sigma.fill_(sigma)
        self.removed.fill_(True)

    def linear_form(self) -> tuple[Tensor, Tensor]:
        """(A, b) with y = A x + b, (dim, dim) and (dim,), float64. ValueError while it is still a LayerNorm."""
        if not self.removed:
            raise ValueError("norm: a fakenorm that was not removed is not linear")
        eye = torch.eye(self.dim, dtype=torch.float64, device=self.sigma.device)
        matrix, bias = (eye - 1 / self.dim) / self.sigma.double(), torch.zeros_like(eye[0])
        matrix = matrix if self.weight is None else self.weight.detach().double()[:, None] * matrix
        return matrix, bias if self.bias is None else self.bias.detach().double()
