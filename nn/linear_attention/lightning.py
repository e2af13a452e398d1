from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rmsnorm import rms_norm
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.linear_attention.memory import MatrixMemory
from nn.position.alibi import ALiBi
from nn.position.none import NoPosition

# B batch, T time, C model dim, H heads, D head dim


class LightningAttention(MatrixMemory):
    """The attention of TransNormerLLM: linear, with a decay that is constant a head and weaker from layer to layer.

    Qin et al. 2023, "Scaling TransNormer to 175 Billion Parameters" (arXiv:2307.14995), section 3; computed in chunks, as
    Qin et al. 2024, "Lightning Attention-2" (arXiv:2401.04658), do:

        S_t = lambda S_{t-1} + k_t v_t^T,   q = silu(W_q x), k = silu(W_k x), v = W_v x
        y_t = W_out (norm(S_t^T q_t) * W_gate x_t)           norm to unit root mean square, over all heads together

    slopes     -log(lambda): `linear` is the text's 8 h / H (1 - l / L) of head h = 1 … H in layer l = 0 … L - 1 (where they
               begin it does not say); `alibi` is what the released models have, ALiBi's slopes 2^(-8 h / H) times
               1 - l / (L - 1) + 1e-5
    layer      which layer this is, from 1 on, and of how many `layers`: the model says so where the spec does not

    Only the first layer turns its queries and keys, as the position encoding says: the paper's LRPE, of which rotary
    positions are a case (Qin et al. 2023, arXiv:2307.09270); its released models weight each channel by a cosine.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is H D D numbers whatever the length. ValueError if asked to see
    what follows (causal=False).
    """

    together = ("query", "key", "value", "gate")

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        slopes: Literal["linear", "alibi"] = "linear",
        layer: int = 1,
        layers: int = 1,
        eps: float = 1e-6,
    ):
        at_least(1, heads=heads, head_dim=head_dim, layer=layer)
        at_least(layer, layers=layers)
        at_least(0, eps=eps)
        D = width_of_heads(dim, heads, head_dim)
        super().__init__(heads, D, D)
        self.slopes, self.layer, self.layers, self.eps = slopes, layer, layers, eps
        self.rotate = (position if position is not None and layer == 1 else NoPosition()).rotate
        self.query, self.key, self.value, self.gate = (Linear(dim, heads * D, bias=False) for _ in range(4))
        self.out = output_projection(heads * D, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v, gate = project(x, self.query, self.key, self.value, self.gate)
        q, k, v = self.heads_of(F.silu(q), F.silu(k), v)  # (B, T, H, D) each
        q, k = self.rotate(q, context), self.rotate(k, context)
        o = self.recall(q, k, v, context, -slopes_of(self.slopes, self.heads, self.layer, self.layers))
        return self.out(rms_norm(o.flatten(2), eps=self.eps) * gate)


def slopes_of(kind: str, heads: int, layer: int, layers: int) -> Tensor:
    """(H,) float64, -log of the decay of each head in a layer that is counted from 1."""
    if kind == "linear":
        return 8 * torch.arange(1, heads + 1, dtype=torch.float64) / heads * (1 - (layer - 1) / layers)
    return ALiBi().slopes(heads).double() * (1 - (layer - 1) / max(1, layers - 1) + 1e-5)
