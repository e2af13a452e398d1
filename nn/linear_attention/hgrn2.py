import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.rmsnorm import rms_norm
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.linear_attention.memory import MatrixMemory

# B batch, T time, C model dim, H heads, D key dim, V = C / H value dim


class HGRN2(MatrixMemory):
    """A gated recurrent network whose state is expanded to a matrix: what is forgotten makes room for what is written.

    Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion" (arXiv:2404.07904), section 3:

        f_t = b + (1 - b) sigmoid(W_f x_t)                   D numbers a head, none below the bound b
        S_t = diag(f_t) S_{t-1} + (1 - f_t) (W_v x_t)^T
        y_t = W_out norm(S_t^T silu(W_q x_t))                norm over all heads together, with a gain

    The bound rises with the layers, so that the higher ones remember for longer: b = (layer - 1) / layers, unless `bound`
    says. These are the values that the authors' begin with; they learn them, by a softmax over the layers that a
    mixer cannot see from where it stands. The model says which `layer` of how many `layers` this is where the spec does
    not. `expand` is D, the factor by which the state is larger than C (128 in the paper, with C / 128 heads); by default V.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is C D numbers whatever the length. ValueError if asked to see
    what follows (causal=False).
    """

    together = ("query", "forget", "value")

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        expand: int | None = None,
        bound: float | None = None,
        layer: int = 1,
        layers: int = 1,
        eps: float = 1e-5,
    ):
        at_least(1, heads=heads, expand=expand, layer=layer)
        at_least(layer, layers=layers)
        at_least(0, bound=bound, eps=eps)
        V = width_of_heads(dim, heads, None)
        D = expand or V
        super().__init__(heads, D, V)
        self.bound, self.eps = (layer - 1) / layers if bound is None else bound, eps
        if self.bound >= 1:
            raise ValueError(f"bound: {bound} is not less than 1")
        self.query, self.forget = (Linear(dim, heads * D, bias=False) for _ in range(2))
        self.value = Linear(dim, dim, bias=False)
        self.gain = nn.Parameter(torch.ones(dim))
        self.out = output_projection(dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, f, v = self.heads_of(*project(x, self.query, self.forget, self.value))
        g, k = self.gates(f)  # (B, T, H, D) each
        o = self.recall(F.silu(q), k, v, context, g)
        return self.out(rms_norm(o.flatten(2), self.gain, eps=self.eps))

    def gates(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """log f_t and 1 - f_t from W_f x_t, in float32 at least: neither is the other's difference to 1."""
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        kept = torch.log(self.bound + (1 - self.bound) * f.sigmoid()) if self.bound else F.logsigmoid(f)
        return kept, (1 - self.bound) * torch.sigmoid(-f)
