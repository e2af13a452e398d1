from typing import Literal

from nn.ffn.mlp import MLP
from nn.monarch import MonarchLinear


class MonarchMLP(MLP):
    """An MLP whose two matrices are Monarch: W2 f(W1 x), each a product of two block-diagonal matrices with a permutation.

    Fu et al. 2023, "Monarch Mixer" (arXiv:2310.12109), section 3: the mixer of the dimensions of M2. `blocks` is how many
    blocks a factor has, by default the root of dim, which makes it smallest; the authors' M2-BERT has 4. With dim and
    width divisible by it, it has 2 dim (dim + width) / blocks parameters, where `mlp` has 2 dim width. `width` and
    `activation` are those of `mlp`.
    Shapes: (B, T, dim) -> (B, T, dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        blocks: int | None = None,
        activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "star_relu", "silu"] = "gelu",
        bias: bool = False,
    ):
        super().__init__(dim, width=width, activation=activation, bias=bias)
        width = width or 4 * dim
        self.up = MonarchLinear(dim, width, blocks=blocks, bias=bias)
        self.down = MonarchLinear(width, dim, blocks=blocks, bias=bias)
        self.down.writes_residual = True
