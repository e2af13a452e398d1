from torch import Tensor, nn

from nn.checks import at_least
from nn.context import Context
from nn.position.none import NoPosition


class LearnedPosition(NoPosition):
    """A learned vector a position, added to the token embedding.

    Gehring et al. 2017, "Convolutional Sequence to Sequence Learning" (arXiv:1705.03122); GPT-2 uses it.
    `seq_len` is how many positions there are; a model refuses longer sequences.
    """

    def __init__(self, dim: int, *, seq_len: int = 1024):
        super().__init__()
        at_least(1, seq_len=seq_len)
        self.table = nn.Embedding(seq_len, dim)
        self.max_len = seq_len

    def embed(self, x: Tensor, context: Context) -> Tensor:
        return x + self.table(context.positions)
