from torch import Tensor

from models.residual import Residual
from nn.context import Context


class Plain:
    """Everything that a gradient needs is kept, and nothing is computed twice."""

    def __call__(self, sublayer: Residual, x: Tensor, context: Context) -> Tensor:
        return sublayer(x, context)
