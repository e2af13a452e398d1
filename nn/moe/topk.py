from typing import Literal

import torch
from torch import Tensor

from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear
from nn.moe.routing import Router, Routing, linear_in_float32


class TopK(Router):
    """The experts with the largest logits, weighted by a softmax over the chosen or over all.

    `over=chosen`, top-k and then softmax: weights sum to 1, so that equal experts make a mixture equal to any one of them
    (Jiang et al. 2024, "Mixtral of Experts", arXiv:2401.04088, section 2.1). `over=all`, softmax and then top-k: what the
    others would have had is lost (Lepikhin et al. 2020, "GShard", arXiv:2006.16668; Muennighoff et al. 2024, "OLMoE",
    arXiv:2409.02060). Renormalising the second gives the first. `jitter` e multiplies each number the router reads in training
    by one between 1 - e and 1 + e (Fedus et al. 2021, arXiv:2101.03961, section 2.4).
    """

    def __init__(
        self,
        dim: int,
        experts: int = 8,
        top_k: int = 2,
        *,
        over: Literal["chosen", "all"] = "chosen",
        jitter: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(experts, top_k)
        at_least(0, jitter=jitter)
        self.over, self.jitter = over, jitter
        self.gate = Linear(dim, experts, bias=bias)

    def forward(self, x: Tensor, context: Context) -> Routing:
        if self.jitter and self.learns():
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        return chosen(linear_in_float32(self.gate, x), self.top_k, over=self.over)


class Switch(TopK):
    """One expert a token, weighted by its share of the softmax over all.

    Fedus et al. 2021, "Switch Transformers" (arXiv:2101.03961), section 2.1.
    """

    def __init__(self, dim: int, experts: int = 8, *, jitter: float = 0.0, bias: bool = False):
        super().__init__(dim, experts, 1, over="all", jitter=jitter, bias=bias)


def chosen(logits: Tensor, top_k: int, *, over: str, choose_by: Tensor | None = None) -> Routing:
    """The routing of logits (N, E) to the top k of them, or of `choose_by` (N, E)."""
    scores = logits.softmax(-1)
    experts = (logits if choose_by is None else choose_by).topk(top_k, -1).indices  # (N, K)
    weights = logits.gather(-1, experts).softmax(-1) if over == "chosen" else scores.gather(-1, experts)
    return Routing(experts, weights, scores, logits)
