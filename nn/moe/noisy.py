import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear
from nn.moe.routing import Router, Routing, linear_in_float32
from nn.moe.topk import chosen


class NoisyTopK(Router):
    """Top-k of logits to which training adds noise, of a size that is learned too; weights are a softmax over the chosen.

    Shazeer et al. 2017, "Outrageously Large Neural Networks" (arXiv:1701.06538), equations 3 to 5 and appendix A:

        H = x W + n softplus(x W_noise),  n normal;   weights = softmax over the top k of H
        importance_e = sum of e's weights;            L = c CV(importance)^2
        load_e = sum of P(e is chosen, were its noise drawn again);   L = c CV(load)^2

    CV is the standard deviation divided by the mean. `importance` and `load` are the coefficients c of the two losses, both
    0.01 in LLaMA-MoE (Zhu et al. 2024, arXiv:2406.16554, as its authors' code has it). Both matrices begin at zero.
    """

    def __init__(self, dim: int, experts: int = 8, top_k: int = 2, *, importance: float = 0.0, load: float = 0.0):
        super().__init__(experts, top_k)
        at_least(0, importance=importance, load=load)
        self.importance, self.load = importance, load
        self.gate, self.noise = Linear(dim, experts, bias=False), Linear(dim, experts, bias=False)
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        for layer in (self.gate, self.noise):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, context: Context) -> Routing:
        logits = linear_in_float32(self.gate, x)  # (N, E)
        if not self.learns():
            return chosen(logits, self.top_k, over="chosen")
        size = F.softplus(linear_in_float32(self.noise, x)) + 1e-2  # their least noise
        noisy = logits + size * torch.randn_like(logits)
        routing = chosen(noisy, self.top_k, over="chosen")
        if self.importance or self.load:
            weights = torch.zeros_like(noisy).scatter(-1, routing.experts, routing.weights)
            loads = self.chances(logits, noisy, size)
            self.own_loss = self.importance * squared_cv(weights.sum(0)) + self.load * squared_cv(loads.sum(0))
        return routing

    def chances(self, clean: Tensor, noisy: Tensor, size: Tensor) -> Tensor:
        """(N, E): the probability that an expert is among the chosen if only its own noise is drawn again (equation 9)."""
        if self.top_k == self.experts:
            return torch.ones_like(clean)
        best = noisy.topk(self.top_k + 1, -1).values
        within = noisy >= best[:, -2:-1]  # who is chosen must beat the first who is not, the others the last who is
        least = torch.where(within, best[:, -1:], best[:, -2:-1])
        return torch.special.ndtr((clean - least) / size)


def squared_cv(x: Tensor) -> Tensor:
    """The variance of x (E,) divided by its squared mean; 0 for a single number."""
    return x.var(unbiased=False) / (x.mean() ** 2 + 1e-10)
