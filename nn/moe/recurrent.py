import torch
from torch import Tensor

from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear
from nn.moe.routing import Router, Routing, linear_in_float32
from nn.moe.topk import chosen


class RecurrentRouter(Router):
    """A router that remembers, for each token, what the routers of the layers before it saw.

    Qiu et al. 2024, "Layerwise Recurrent Router for Mixture-of-Experts" (arXiv:2408.06793), equations 3 to 5, in layer l:

        u_l = x_l P_l;   h_l = GRU(u_l, h_{l-1});   logits = h_l G_l

    `hidden` numbers a token. P and G are the layer's own, the GRU is one for all layers (the model ties them: see
    `shared_by_layers`), and h_0 = 0. The recurrence runs over the depth, so all tokens of a layer go at once, and gradients
    reach earlier routers through h as well as through x. Weights are a softmax over the chosen.
    """

    shared_by_layers = ("from_input", "from_memory")

    def __init__(self, dim: int, experts: int = 8, top_k: int = 2, *, hidden: int = 128):
        super().__init__(experts, top_k)
        at_least(1, hidden=hidden)
        self.project = Linear(dim, hidden, bias=False)
        self.from_input = Linear(hidden, 3 * hidden, bias=True)
        self.from_memory = Linear(hidden, 3 * hidden, bias=True)
        self.gate = Linear(hidden, experts, bias=False)

    def forward(self, x: Tensor, context: Context) -> Routing:
        u = linear_in_float32(self.project, x)  # (N, P)
        h = self.step(u, context.shared.get("router memory"))
        context.shared["router memory"] = h
        return chosen(linear_in_float32(self.gate, h), self.top_k, over="chosen")

    def step(self, u: Tensor, h: Tensor | None) -> Tensor:
        """One step of the gated recurrent unit of Cho et al. 2014 (arXiv:1406.1078), as torch.nn.GRUCell has it: (N, P)."""
        h = torch.zeros_like(u) if h is None else h
        (r, z, n), (hr, hz, hn) = (
            linear_in_float32(layer, y).chunk(3, -1) for layer, y in ((self.from_input, u), (self.from_memory, h))
        )
        r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
        return (1 - z) * (n + r * hn).tanh() + z * h
