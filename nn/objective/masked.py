import numpy as np
import torch
from torch import Tensor

from nn.objective.next_token import IGNORED


class MaskedTokens:
    """Masked-token prediction, for encoders: some tokens are hidden, and the model says what stood there.

    Devlin et al. 2018, "BERT" (arXiv:1810.04805), section 3.1. `rate` of the tokens are to be told; of these, `keep` are
    shown as they are, `random` replaced by any token, the others by the mask token: the id `mask` of the vocabulary (103 in
    BERT's own), by default the first that the tokenizer does not use. Portes et al. 2023, "MosaicBERT" (arXiv:2312.17482),
    hide 30 % and round the vocabulary up to a multiple of 64, as is done where a mask token is added.
    """

    causal = False

    def __init__(self, *, rate: float = 0.3, keep: float = 0.1, random: float = 0.1, mask: int | None = None):
        for name, value in (("rate", rate), ("keep", keep), ("random", random)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: a share between 0 and 1, not {value}")
        if rate == 0 or keep + random > 1:
            raise ValueError(f"rate: {rate} must be above 0, and keep + random, {keep + random:g}, at most 1")
        if mask is not None and mask < 0:
            raise ValueError(f"mask: an id from 0 on, not {mask}")
        self.share, self.keep, self.random, self.mask = rate, keep, random, mask

    def vocabulary(self, size: int) -> int:
        """Rows of the embedding for a tokenizer of `size` ids."""
        return -(-(size + 1) // 64) * 64 if self.mask is None else max(size, self.mask + 1)

    def __call__(self, inputs: Tensor, targets: Tensor, size: int, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What the model reads and what it is to say, both (B, T) int64, from tokens `inputs` (B, T) below `size`."""
        draws = np.random.default_rng(seed)
        hidden = torch.from_numpy(draws.random(inputs.shape) < self.share)
        fate = torch.from_numpy(draws.random(inputs.shape))
        others = torch.from_numpy(draws.integers(size, size=inputs.shape))
        mask = size if self.mask is None else self.mask
        shown = torch.where(fate < self.keep, inputs, torch.where(fate < self.keep + self.random, others, mask))
        return torch.where(hidden, shown, inputs), inputs.masked_fill(~hidden, IGNORED)
