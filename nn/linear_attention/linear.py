from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_attention import linear_attention
from kernels.rmsnorm import rms_norm
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.linear_attention.memory import MatrixMemory
from nn.ssm.common import without_autocast

# B batch, T time, C model dim, H heads, D head dim

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softmax": lambda x: x.softmax(-1),
    "identity": lambda x: x,
}
SMALLEST = 1e-6  # a sum of weights below it counts as this: features of relu may all be 0


class KernelAttention(MatrixMemory):
    """Attention whose exp(q . k) is replaced by a product of features, f(q) . f(k), so that all keys fit into a matrix.

    Katharopoulos et al. 2020, "Transformers are RNNs" (arXiv:2006.16236), eq. 4 to 7 and 16 to 20:

        o_t = sum_{s <= t} f(q_t).f(k_s) v_s  /  sum_{s <= t} f(q_t).f(k_s)

    feature    f: elu(x) + 1 (the paper's), relu, softmax over the D numbers of a head (Shen et al. 2018,
               arXiv:1812.01243), or identity
    weights    `sum`: divided by their sum, as above; `rms`: the output has unit root mean square instead (Qin et al. 2022,
               "The Devil in Linear Transformer", arXiv:2210.10340, section 4.1); `none`. By default sum, and rms for
               identity, whose weights may sum to nothing

    There is no decay, and queries and keys are not turned: order is known from causality and from what a position encoding
    adds to the embeddings. An encoder (causal=False) sums over all s, of its document if the row is packed.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is H D D numbers, H D more for the sum of the keys.
    """

    together = ("query", "key", "value")
    passes = 2

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        feature: Literal["elu", "relu", "softmax", "identity"] = "elu",
        weights: Literal["sum", "rms", "none"] | None = None,
    ):
        at_least(1, heads=heads, head_dim=head_dim)
        D = width_of_heads(dim, heads, head_dim)
        weights = weights or ("rms" if feature == "identity" else "sum")
        if feature == "identity" and weights == "sum":
            raise ValueError("weights: those of the feature identity may sum to nothing; take rms or none")
        super().__init__(heads, D, D + 1 if weights == "sum" else D)
        self.feature, self.weights = feature, weights
        self.query, self.key, self.value = (Linear(dim, heads * D, bias=False) for _ in range(3))
        self.out = output_projection(heads * D, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.heads_of(*project(x, self.query, self.key, self.value))  # (B, T, H, D) each
        q, k = FEATURES[self.feature](q), FEATURES[self.feature](k)
        if self.weights == "sum":
            v = F.pad(v, (0, 1), value=1.0)  # (B, T, H, D + 1): a value of 1 sums the weights
        o = self.recall(q, k, v, context, scale=self.key_dim**-0.5) if context.causal else self.see_all(q, k, v, context)
        if self.weights == "sum":
            o = o[..., :-1] / o[..., -1:].clamp(min=SMALLEST)
        elif self.weights == "rms":
            o = rms_norm(o)
        return self.out(o.flatten(2))

    def see_all(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """The same sum over all times s, before and after t, of t's document."""
        if context.state is not None:
            raise ValueError("causal: an encoder sees all tokens at once; it has no decoding state")
        scale, documents = self.key_dim**-0.5, context.documents
        if documents is None:
            with without_autocast(v.device):
                return torch.einsum("bthd,bhdv->bthv", q * scale, torch.einsum("bthd,bthv->bhdv", k, v))
        before, _ = linear_attention(q, k, v, scale=scale, documents=documents)
        after, _ = linear_attention(*(u.flip(1) for u in (q, k, v)), scale=scale, documents=documents.flip(1))
        return before + after.flip(1) - scale * (q * k).sum(-1, keepdim=True) * v  # t itself is in both
