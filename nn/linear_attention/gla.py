import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.glu import glu
from kernels.rmsnorm import rms_norm
from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.linear_attention.memory import MatrixMemory

# B batch, T time, C model dim, H heads, D key dim, V value dim

LARGEST = 256  # numbers of a head, as the kernel takes them


class GLA(MatrixMemory):
    """Gated linear attention: each channel of the keys is forgotten at a rate that the token chooses.

    Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training" (arXiv:2312.06635), section 4:

        a_t = sigmoid(W_up W_down x_t + b)^(1 / 16)           D numbers a head, of rank 16 in x
        S_t = diag(a_t) S_{t-1} + k_t v_t^T
        y_t = W_out (silu(W_gate x_t + b') * norm(S_t^T q_t))

    `rank` is that of the gates, `temper` their 16. Keys and queries have C `expand_k` numbers, half as many as values. Each
    head is normed alone, to unit root mean square with one gain for all: the paper writes LayerNorm, its code takes this.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is H D V numbers whatever the length. ValueError if asked to see
    what follows (causal=False).
    """

    together = ("query", "key", "value", "gate", "decay_down")

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        rank: int = 16,
        temper: float = 16.0,
        eps: float = 1e-5,
    ):
        at_least(1, heads=heads, rank=rank, temper=temper)
        at_least(0, eps=eps)
        D, V = shares(dim, heads, expand_k=expand_k, expand_v=expand_v)
        super().__init__(heads, D, V)
        self.temper, self.eps = temper, eps
        self.query, self.key = (Linear(dim, heads * D, bias=False) for _ in range(2))
        self.value, self.gate = Linear(dim, heads * V, bias=False), Linear(dim, heads * V)
        self.decay_down, self.decay_up = Linear(dim, rank, bias=False), Linear(rank, heads * D)
        self.gain = nn.Parameter(torch.ones(V))
        self.out = output_projection(heads * V, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v, gate, decay = project(x, self.query, self.key, self.value, self.gate, self.decay_down)
        q, k, v, decay = self.heads_of(q, k, v, self.decay_up(decay))  # (B, T, H, D), values (B, T, H, V)
        g = F.logsigmoid(decay.to(torch.promote_types(decay.dtype, torch.float32))) / self.temper
        o = self.recall(q, k, v, context, g, scale=self.key_dim**-0.5)
        return self.out(glu(gate, rms_norm(o, self.gain, eps=self.eps).flatten(2), activation="silu"))


def shares(dim: int, heads: int, **parts: float) -> list[int]:
    """For each part the numbers of a head, where all heads have dim * part. ValueError if they are no whole number."""
    for name, part in parts.items():
        if not heads <= dim * part <= LARGEST * heads or dim * part % heads:
            raise ValueError(f"{name}: {part} times {dim} numbers do not divide into {heads} heads of 1 to {LARGEST}")
    return [int(dim * part) // heads for part in parts.values()]
