import torch
from torch import Tensor

from nn.context import Context
from nn.linear import Linear
from nn.moe.routing import Router, Routing, linear_in_float32


class RLRouter(Router):
    """A policy that draws one expert a token and is rewarded by what the model then says of it.

    RL-R of Clark et al. 2022, "Unified Scaling Laws for Routed Language Models" (arXiv:2202.01169), section 3.3: REINFORCE
    with one step an episode. In training an expert is drawn from the softmax of the logits; at inference the likeliest is
    taken. The cost of a token is its own -log p; that of the other tokens is the baseline, which leaves the gradient unbiased.
    The output is not weighted, so that the policy learns by reward alone. `policy` is the coefficient of its loss,
    `entropy` that of a bonus for staying undecided.
    """

    def __init__(self, dim: int, experts: int = 8, *, policy: float = 0.01, entropy: float = 0.001):
        super().__init__(experts, 1)
        self.policy, self.entropy = policy, entropy
        self.gate = Linear(dim, experts, bias=False)
        self.taken: tuple[Tensor, Tensor] | None = None  # log-probabilities (N, E) of the last pass, and what was drawn (N, 1)

    def forward(self, x: Tensor, context: Context) -> Routing:
        logits = linear_in_float32(self.gate, x)
        scores = logits.softmax(-1)
        if self.learns():
            experts = torch.multinomial(scores.detach(), 1) if len(x) else scores.new_zeros(0, 1, dtype=torch.int64)
            self.taken = logits.log_softmax(-1), experts
        else:
            experts = logits.argmax(-1, keepdim=True)
        return Routing(experts, torch.ones_like(experts, dtype=logits.dtype), scores, logits)

    def policy_loss(self, costs: Tensor) -> Tensor:
        """The loss, nats a token, whose gradient is that of the expected cost; `costs` (N,) of the tokens of the last pass."""
        log_probs, experts = self.taken
        self.taken = None
        others = (costs.sum() - costs) / max(1, len(costs) - 1)
        advantage = (costs - others).detach()
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return (self.policy * advantage * log_probs.gather(-1, experts)[:, 0] - self.entropy * entropy).mean()
