import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rmsnorm import rms_norm
from kernels.rope import angles
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.linear_attention.memory import MatrixMemory

# B batch, T time, C model dim, H heads, D head dim


class CosFormer2(MatrixMemory):
    """Linear attention without decay, in which each channel of a query meets a key weighted by the cosine of their distance.

    Shen et al. 2024, "Scaling Laws for Linear Complexity Language Models" (arXiv:2406.16690), after Qin et al. 2022,
    "cosFormer" (arXiv:2202.08791), whose denominator a norm replaces:

        a_ts = sum_j q_tj k_sj cos(theta_j (t - s)),   q = silu(W_q x), k = silu(W_k x)
        y_t = W_out (norm(sum_{s <= t} a_ts v_s) * sigmoid(W_up W_down x_t))

    Since cos(a - b) = cos a cos b + sin a sin b, it is a product of keys twice as wide. Choices of ours, where the paper
    does not say: theta_j = theta^(-2 j / (H D)), j counting the channels of all heads, the frequencies of the authors'
    LRPE, and not learned; a gate of rank D, as in their later code; the norm over all heads together and before the gate, as
    in `lightning`.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is 2 H D D numbers whatever the length. ValueError if asked to see
    what follows (causal=False).
    """

    together = ("query", "key", "value", "gate_down")
    passes = 2

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        theta: float = 10000.0,
        rank: int | None = None,
        eps: float = 1e-6,
    ):
        at_least(1, heads=heads, head_dim=head_dim, theta=theta, rank=rank)
        at_least(0, eps=eps)
        D = width_of_heads(dim, heads, head_dim)
        super().__init__(heads, 2 * D, D)
        self.theta, self.eps = theta, eps
        self.query, self.key, self.value = (Linear(dim, heads * D, bias=False) for _ in range(3))
        self.gate_down, self.gate_up = Linear(dim, rank or D, bias=False), Linear(rank or D, heads * D, bias=False)
        self.out = output_projection(heads * D, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v, gate = project(x, self.query, self.key, self.value, self.gate_down)
        q, k, v = self.heads_of(F.silu(q), F.silu(k), v)  # (B, T, H, D) each
        q, k = self.waves(q, context), self.waves(k, context)  # (B, T, H, 2 D)
        o = rms_norm(self.recall(q, k, v, context).flatten(2), eps=self.eps)
        return self.out(o * self.gate_up(gate).sigmoid())

    def waves(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, H, D) -> (B, T, H, 2 D): each number times the cosine and times the sine of its angle."""
        H, D = x.shape[2:]
        exact = torch.promote_types(x.dtype, torch.float32)
        frequencies = self.theta ** (-2 * torch.arange(H * D, dtype=torch.float64) / (H * D))
        tables = context.once(("waves", self.theta, H, D, exact), lambda: angles(context.positions, frequencies, exact))
        return torch.cat([x * table.unflatten(-1, (H, D)) for table in tables], -1).to(x.dtype)
