"""What a router decides, and what all routers share."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear

# N tokens, E experts, K choices a token


@dataclass
class Routing:
    """Where each of N tokens goes.

    experts: (N, K) int64; E, the number of experts, stands for none. weights: (N, K), the gate of each choice, float32 at
    least. scores: (N, E), what the choice was made from, each row with the sum 1, for the balance loss; None where nothing was
    learned. logits: (N, E), what the scores are made of, for the z-loss; or None.
    """

    experts: Tensor
    weights: Tensor
    scores: Tensor | None = None
    logits: Tensor | None = None

    def detached(self) -> "Routing":
        """The same numbers without their history, to be kept."""
        return Routing(*(None if t is None else t.detach() for t in vars(self).values()))


class Router(nn.Module):
    """`(x, context) -> Routing` for x (N, dim), the tokens of `context` in a row. ValueError for more choices than experts.

    Routers compute in float32 whatever autocast says: where two experts are nearly as good, a rounding decides (Fedus et al.
    2021, "Switch Transformers", arXiv:2101.03961, section 2.4). One that has a loss of its own leaves it in `own_loss`, nats
    a token, when it learns.
    """

    own_loss: Tensor | None = None

    def __init__(self, experts: int, top_k: int):
        super().__init__()
        at_least(1, experts=experts, top_k=top_k)
        if top_k > experts:
            raise ValueError(f"top_k: {top_k} of {experts} experts")
        self.experts, self.top_k = experts, top_k

    def learns(self) -> bool:
        """Whether this pass is a step of training: where gradients are asked for, and `eval()` was not called."""
        return self.training and torch.is_grad_enabled()


def linear_in_float32(layer: Linear, x: Tensor) -> Tensor:
    """x W^T + b in float32 (float64 if x is), under autocast too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        y = F.linear(x.to(wide), layer.weight.to(wide), None if layer.bias is None else layer.bias.to(wide))
        return y if layer.adapter is None else y + layer.adapter(x.to(wide))


def counts_of(experts: Tensor, many: int) -> Tensor:
    """(E,) int64: how many choices each expert has. Choices of `many`, which are none, do not count."""
    chosen = experts.flatten()
    return chosen.new_zeros(many + 1).scatter_add_(0, chosen, torch.ones_like(chosen))[:many]


def tokens_of(context: Context) -> Tensor:
    """(N,): the token ids in the order in which routers see the tokens."""
    return context.tokens.flatten()
