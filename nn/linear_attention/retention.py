import torch
from torch import Tensor

from kernels.glu import glu
from kernels.rmsnorm import rms_norm
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.linear_attention.memory import MatrixMemory
from nn.position.none import NoPosition

# B batch, T time, C model dim, H heads, D key dim, V = expand D value dim


class Retention(MatrixMemory):
    """Retention: linear attention that forgets, each head at a constant rate of its own.

    Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language Models" (arXiv:2307.08621), section 2:

        S_t = (1 - 2^(-5 - h)) S_{t-1} + k_t v_t^T            h = 0 … H - 1
        y_t = W_out (silu(W_gate x_t) * norm(S_t^T q_t))

    Queries and keys are turned as the position encoding says, which is the rotation of the paper's eq. 3 with rope (its
    pairs are neighbours: `rope:interleaved=true`). Each head is normed alone, to unit root mean square: the paper writes
    GroupNorm, its code takes this. Values are `expand` times as wide as keys.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is H D V numbers whatever the length. ValueError if asked to see
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
        expand: int = 2,
        eps: float = 1e-6,
    ):
        at_least(1, heads=heads, head_dim=head_dim, expand=expand)
        at_least(0, eps=eps)
        D = width_of_heads(dim, heads, head_dim)
        super().__init__(heads, D, expand * D)
        self.eps, self.rotate = eps, (position or NoPosition()).rotate
        self.query, self.key = (Linear(dim, heads * D, bias=False) for _ in range(2))
        self.value, self.gate = (Linear(dim, heads * expand * D, bias=False) for _ in range(2))
        self.out = output_projection(heads * expand * D, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v, gate = project(x, self.query, self.key, self.value, self.gate)
        q, k, v = self.heads_of(q, k, v)  # (B, T, H, D), (B, T, H, D), (B, T, H, V)
        q, k = self.rotate(q, context), self.rotate(k, context)
        o = self.recall(q, k, v, context, forgetting(self.heads), scale=self.key_dim**-0.5)
        return self.out(glu(gate, rms_norm(o, eps=self.eps).flatten(2), activation="silu"))


def forgetting(heads: int) -> Tensor:
    """(H,) float64, log(1 - 2^(-5 - h)): the logarithm of what each head keeps a time."""
    return torch.log1p(-torch.exp2(-5 - torch.arange(heads, dtype=torch.float64)))
