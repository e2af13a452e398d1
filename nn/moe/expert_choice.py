import torch
from torch import Tensor

from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear
from nn.moe.routing import Router, Routing, linear_in_float32


class ExpertChoice(Router):
    """Experts choose tokens: each takes those that score highest with it, as many as any other expert.

    Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing" (arXiv:2202.09368), section 3.2: of the softmax over the
    experts, expert e takes its `capacity` N / E largest tokens, rounded up. A token is taken by none, by some, by all; the load
    is equal by construction. Who is chosen depends on the tokens that follow, so it is for encoders: ValueError where tokens
    see only what stands before them. N are the tokens of the whole batch.
    """

    def __init__(self, dim: int, experts: int = 8, *, capacity: float = 2.0):
        super().__init__(experts, experts)
        at_least(0, capacity=capacity)
        self.capacity = capacity
        self.gate = Linear(dim, experts, bias=False)

    def forward(self, x: Tensor, context: Context) -> Routing:
        if context.causal:
            raise ValueError("causal: experts that choose look at all tokens, later ones too; this router is for encoders")
        logits = linear_in_float32(self.gate, x)
        scores = logits.softmax(-1)  # (N, E)
        taken = min(len(x), -int(-self.capacity * len(x) // self.experts))
        tokens = scores.topk(taken, 0).indices  # (taken, E)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(0, tokens, True)
        every = torch.arange(self.experts, device=x.device).expand_as(scores)
        experts = torch.where(chosen, every, self.experts)
        most = int(chosen.sum(-1).max()) if len(x) else 0  # choices a token: few, so that the rest is cut off
        experts, place = experts.sort(-1)
        experts, place = experts[:, : max(1, most)], place[:, : max(1, most)]
        return Routing(experts, scores.gather(-1, place) * (experts < self.experts), scores, logits)
