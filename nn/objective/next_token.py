import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from nn.linear import cast_once

IGNORED = -100  # a target that does not count
BIAS_COLUMNS = 8  # what a bias adds to the head's rows: they stay multiples of 16 bytes, which tensor cores want


def next_token_loss(
    x: Tensor, head: Tensor, targets: Tensor, *, bias: Tensor | None = None, softcap: float = 0.0
) -> Tensor:
    """The next-token objective: the sum over the tokens of -log softmax(x head^T + bias)[target], in nats.

    Shapes: x (N, C), head (V, C), targets (N,) int64, bias (V,) -> scalar float32 (float64 for float64 inputs). Targets
    of -100 count nothing. Under autocast the matmuls run in its dtype, the rest in float32. `softcap` c > 0 replaces each
    logit z by c tanh(z / c). A bias is one column more of the head, of which x has a 1, so that logits need not be whole.
    """
    x = cast_once(x)
    if bias is not None:
        x = F.pad(x, (0, BIAS_COLUMNS), value=1.0)
        head = F.pad(torch.cat([head, bias[:, None]], dim=1), (0, BIAS_COLUMNS - 1))  # zeros beside it
    return linear_cross_entropy(x, head, targets, ignore_index=IGNORED, softcap=softcap)


class NextToken:
    """Next-token prediction: the model says each token from those before it."""

    causal = True
    share = 1.0  # of the tokens that count

    def vocabulary(self, size: int) -> int:
        """Rows of the embedding for a tokenizer of `size` ids."""
        return size

    def __call__(self, inputs: Tensor, targets: Tensor, size: int, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What the model reads and what it is to say: the loader's inputs and targets (B, T) as they are."""
        return inputs, targets
