from collections.abc import Callable

import torch
from torch import Tensor

from nn.checks import at_least
from nn.norm.powernorm import PowerNorm, move, tokens_mean


def geometric_mean(window: Tensor) -> Tensor:
    """(M, dim), not negative -> (dim,): the M-th root of the product, zero where a factor is."""
    return window.log().mean(0).exp()


def mean_gap(window: Tensor) -> Tensor:
    """(M, dim) -> (dim,): arithmetic minus geometric mean; never negative, 0 where all M are equal."""
    return window.mean(0) - geometric_mean(window)


class UnifiedNorm(PowerNorm):
    """PowerNorm over a window: psi^2 is the geometric mean of the batches' mean squares in the last `window` steps.

        forward     s = mean(x^2) of the batch by feature,  psi^2 = GM(s_t, …, s_(t-M+1)),  h = x / psi,  y = h gain + bias
        backward    nu += (1 - decay) (AM of mean(g h) over the window - nu),  dx = (g - nu h) / psi
        elsewhere   psi^2 is the running mean of those that were used

    A step takes the statistics of its own batch and the exact gradient, without smoothing, during the first `warmup` steps,
    while the window is not full, with a window of 1, and, with `filter`, when the window holds an outlier: when for some
    feature AM - GM of the window exceeds M times the variance of all entries of sqrt(s) in the window before. An outlier's
    place in the windows is then taken by the running statistics. That variance is one over the features too: where they are
    all of one size, the filter takes nearly every step for an outlier. Elsewhere PowerNorm's cautions hold: a causal model
    leaks in training, here in every step.

    Yang et al. 2022, "Unified Normalization for Accelerating and Stabilizing Transformers" (arXiv:2208.01313). Window 4,
    decay 0.9, the filter's threshold and that no mean is subtracted are those of the authors' code, which recommends the
    filter for images only. Choices: 100 steps of warmup (theirs: 4,000), the exact gradient in it (theirs: the smoothed one),
    and no scaling of the gradient by psi / running psi, which that code does after 1,000 steps.

    Shapes: (…, dim) -> (…, dim), same dtype. Its buffers are PowerNorm's, the windows (M, dim) twice, and `skipped`, the
    number of outliers.
    """

    def __init__(
        self, dim: int, *, window: int = 4, filter: bool = False, decay: float = 0.9, eps: float = 1e-5, warmup: int = 100,
        gain: bool = True, bias: bool = True,
    ):  # fmt: skip
        super().__init__(dim, decay=decay, eps=eps, warmup=warmup, gain=gain, bias=bias)
        at_least(1, window=window)
        self.window, self.filter = window, filter
        self.register_buffer("squares", torch.zeros(window, dim))
        self.register_buffer("products", torch.zeros(window, dim))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def statistics(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        batch, rate = tokens_mean(x.square()), 1 - self.decay
        here = (torch.arange(self.window, device=x.device) == self.steps % self.window)[:, None]  # this step's row
        window = torch.where(here, batch, self.squares.to(batch.dtype))
        full = (self.steps >= self.window) & (self.steps >= self.warmup)
        outlier = full & self.is_outlier(window)
        alone = ~full | outlier if self.window > 1 else torch.ones_like(full)
        used = torch.where(alone, batch, geometric_mean(window))
        self.squares.copy_(torch.where(here & outlier, self.mean_square.to(batch.dtype), window))
        move(self.mean_square, used - self.mean_square, rate)
        self.skipped += outlier
        self.steps += 1

        def coefficient(g: Tensor, h: Tensor) -> Tensor:
            gh, nu = tokens_mean(g * h), self.nu.to(g.dtype)
            products = torch.where(here, torch.where(outlier, nu, gh), self.products.to(g.dtype))
            self.products.copy_(products)
            move(self.nu, torch.where(alone, gh, products.mean(0)) - nu, rate)
            return torch.where(alone, gh, self.nu.to(g.dtype))

        return self.psi(used), coefficient

    def is_outlier(self, window: Tensor) -> Tensor:
        """() bool: whether the window that ends with this step spreads more than the one before did."""
        if not self.filter or self.window == 1:
            return torch.zeros((), dtype=torch.bool, device=window.device)
        return (mean_gap(window) > self.window * self.squares.to(window.dtype).sqrt().var()).any()
