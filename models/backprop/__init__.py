"""What the forward pass keeps for the backward pass: `(sublayer, x, context) -> x`, which a model calls while it learns.

Every strategy gives the same gradients; they differ in memory and in what is computed twice. What computes something twice
is not compiled: torch.compile leaves the sublayers as they are.
"""

from collections.abc import Callable

from torch import Tensor

from models.backprop.checkpoint import Checkpoint, Selective
from models.backprop.plain import Plain
from models.backprop.stream import Stream
from models.residual import Residual
from nn.context import Context
from nn.spec import build

BACKPROPS = {
    "plain": Plain,
    "checkpoint": Checkpoint,
    "selective": Selective,
    "stream": Stream,
}


made: dict[str, Callable[[Residual, Tensor, Context], Tensor]] = {}


def backprop(spec: str) -> Callable[[Residual, Tensor, Context], Tensor]:
    """The strategy that a spec of BACKPROPS names."""
    if spec not in made:
        made[spec] = build(spec, BACKPROPS, "backprop")
    return made[spec]
