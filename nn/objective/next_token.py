from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from nn.linear import cast_once

IGNORED = -100  # a target that does not count


def next_token_loss(x: Tensor, head: Tensor, targets: Tensor, *, softcap: float = 0.0) -> Tensor:
    """The next-token objective: the sum over the tokens of -log softmax(x head^T)[target], in nats.

    Shapes: x (N, C), head (V, C), targets (N,) int64 -> scalar float32 (float64 for float64 inputs). Targets of -100
    count nothing. Under autocast the matmuls run in its dtype, the rest in float32. `softcap` c > 0 replaces each logit
    z by c tanh(z / c).
    """
    return linear_cross_entropy(cast_once(x), head, targets, ignore_index=IGNORED, softcap=softcap)
