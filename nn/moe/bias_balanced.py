from typing import Literal

import torch
from torch import Tensor

from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear
from nn.moe.routing import Router, Routing, counts_of, linear_in_float32


class BiasBalanced(Router):
    """Top-k of scores plus a bias that is moved, not learned: experts with too few tokens become likelier, without a loss.

    Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv:2408.15664), algorithm 1, as
    DeepSeek-V3 has it (arXiv:2412.19437, section 2.1.2):

        s = sigmoid(x W);  chosen: the top k of s + b;  weights: s of the chosen, with the sum `scaling` if `renormalise`
        after each step    b_e += rate sign(mean load - load_e)

    The bias decides who is chosen and never weighs. With `groups` > 1 the experts stand in groups, of which the `top_groups`
    whose two best have the largest sum are left to choose from: so a token goes to few machines. `after_step` moves the bias
    by the loads of all processes, or of those of `counted_over`.
    """

    counted_over: torch.distributed.ProcessGroup | None = None

    def __init__(
        self,
        dim: int,
        experts: int = 8,
        top_k: int = 2,
        *,
        score: Literal["sigmoid", "softmax"] = "sigmoid",
        groups: int = 1,
        top_groups: int = 1,
        renormalise: bool = True,
        scaling: float = 1.0,
        rate: float = 1e-3,
    ):
        super().__init__(experts, top_k)
        at_least(1, groups=groups, top_groups=top_groups)
        at_least(0, rate=rate, scaling=scaling)
        if experts % groups or top_groups > groups:
            raise ValueError(f"groups: {experts} experts are not {groups} equal groups of which {top_groups} are taken")
        if top_k > top_groups * (experts // groups) or groups > 1 and experts // groups < 2:
            raise ValueError(
                f"top_groups: {top_groups} of {groups} groups of {experts // groups} experts; at least {top_k} are needed"
            )
        self.score, self.groups, self.top_groups = score, groups, top_groups
        self.renormalise, self.scaling, self.rate = renormalise, scaling, rate
        self.gate = Linear(dim, experts, bias=False)
        self.register_buffer("bias", torch.zeros(experts))
        self.counts = None  # (E,) of the step that is under way

    def forward(self, x: Tensor, context: Context) -> Routing:
        logits = linear_in_float32(self.gate, x)
        raw = logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)
        by = raw.detach() + self.bias
        if self.groups > 1:
            grouped = by.unflatten(-1, (self.groups, -1))  # (N, G, E / G)
            best = grouped.topk(2, -1).values.sum(-1).topk(self.top_groups, -1).indices
            taken = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
            by = grouped.masked_fill(~taken[..., None], -torch.inf).flatten(-2)
        experts = by.topk(self.top_k, -1).indices
        weights = raw.gather(-1, experts)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.learns():
            counts = counts_of(experts, self.experts)
            self.counts = counts if self.counts is None else self.counts + counts
        return Routing(experts, weights * self.scaling, raw / raw.sum(-1, keepdim=True), logits)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the bias by the loads of the step, those of all processes together."""
        if self.counts is None:
            return
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counts, group=self.counted_over)
        counts, self.counts = self.counts.to(self.bias.dtype), None
        self.bias += self.rate * (counts.mean() - counts).sign()
