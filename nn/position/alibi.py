import torch
from torch import Tensor

from nn.checks import at_least
from nn.position.none import NoPosition


class ALiBi(NoPosition):
    """Attention with linear biases: a score loses slope * |i - j|, with another slope for each head, and nothing is turned.

    Press et al. 2021, "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation"
    (arXiv:2108.12409), section 3. With n heads, n a power of two, head h = 1 … n has the slope 2^(-8h/n). Other numbers of
    heads take those of the largest power of two below them and, of twice that power, every second one from the first. In
    an encoder the penalty is the same on both sides (Portes et al. 2023, "MosaicBERT", arXiv:2312.17482).
    """

    def slopes(self, heads: int) -> Tensor:
        """(heads,) float32: how much a score loses for each token of distance."""
        at_least(1, heads=heads)
        power = 1 << (heads.bit_length() - 1)  # the largest power of two up to `heads`
        options = dict(dtype=torch.float64, device="cpu")  # numbers also for a model that is made without memory
        first = torch.arange(1, power + 1, **options) / power
        more = (torch.arange(heads - power, **options) * 2 + 1) / (2 * power)
        return (2 ** (-8 * torch.cat([first, more]))).float()
