"""Heads: what stands between the last norm of the stream and the decoder, whose rows are the words."""

from typing import Literal

from torch import Tensor, nn

from kernels.glu import activate
from nn.linear import Linear
from nn.norm import NORMS
from nn.spec import build

# B batch, T time, C model dim


class LinearHead(nn.Module):
    """Logits are one product with the decoder, plus a bias a word with `decoder_bias`.

    Shapes: (B, T, C) -> the same numbers.
    """

    def __init__(self, *, decoder_bias: bool = False):
        super().__init__()
        self.decoder_bias = decoder_bias

    def forward(self, x: Tensor) -> Tensor:
        return x


class TransformHead(nn.Module):
    """BERT's head: norm(f(W x + b)) goes to the decoder, where each word has a bias of its own.

    Devlin et al. 2018, "BERT" (arXiv:1810.04805), as its authors' code has it. The norm is the model's; ModernBERT
    (Warner et al. 2024, arXiv:2412.13663) has no b: `transform:bias=false`. Shapes: (B, T, C) -> (B, T, C).
    """

    def __init__(
        self,
        dim: int,
        norm: str = "layernorm",
        *,
        activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu",
        bias: bool = True,
        decoder_bias: bool = True,
    ):
        super().__init__()
        self.activation, self.decoder_bias = activation, decoder_bias
        self.dense = Linear(dim, dim, bias=bias)
        self.norm = build(norm, NORMS, "norm", dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(activate(self.dense(x), None, None, activation=self.activation))


HEADS = {
    "linear": LinearHead,
    "transform": TransformHead,
}
