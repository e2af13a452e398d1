import torch
from torch import Tensor

from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear
from nn.moe.routing import Router, Routing, linear_in_float32


class SinkhornRouter(Router):
    """Balanced assignment in training, the largest logit at inference; weighted by the softmax of the logits.

    The S-BASE router of Clark et al. 2022, "Unified Scaling Laws for Routed Language Models" (arXiv:2202.01169), section 3.3:
    the plan nearest to exp(logits) under which every token gives 1 and every expert receives N / E, found by Sinkhorn's
    alternating normalisation, stands for the linear assignment of BASE layers (Lewis et al. 2021, arXiv:2103.16716). Each
    token takes the largest entries of its row. Other tokens of the batch, later ones too, have a say in training only. The
    iteration ends when no expert is off by more than `tolerance` of its share, or after `iterations`.
    """

    def __init__(self, dim: int, experts: int = 8, top_k: int = 1, *, iterations: int = 100, tolerance: float = 1e-3):
        super().__init__(experts, top_k)
        at_least(1, iterations=iterations)
        at_least(0, tolerance=tolerance)
        self.iterations, self.tolerance = iterations, tolerance
        self.gate = Linear(dim, experts, bias=False)

    def forward(self, x: Tensor, context: Context) -> Routing:
        logits = linear_in_float32(self.gate, x)
        scores = logits.softmax(-1)
        by = sinkhorn(logits.detach(), self.iterations, self.tolerance) if self.learns() else logits
        experts = by.topk(self.top_k, -1).indices
        return Routing(experts, scores.gather(-1, experts), scores, logits)


def sinkhorn(logits: Tensor, iterations: int = 100, tolerance: float = 1e-3) -> Tensor:
    """The logarithm of the plan (N, E): rows of exp with the sum 1, columns with N / E within the tolerance."""
    N, E = logits.shape
    plan = logits.log_softmax(-1)
    for _ in range(iterations if N else 0):
        columns = plan.logsumexp(0)  # (E,)
        off = columns - torch.as_tensor(N / E, dtype=plan.dtype).log()
        if off.exp().sub(1).abs().max() <= tolerance:
            break
        plan = (plan - off).log_softmax(-1)
    return plan
