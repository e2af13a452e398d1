import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORE
from data.tasks.task import Task, at_least, nothing_asked


class Induction(Task):
    """Induction heads: a mark stands somewhere in random symbols; at its second coming, what followed the first?

        b a ! c b d a !        the answer: c

    Olsson et al. 2022, "In-context Learning and Induction Heads" (arXiv:2209.11895), as a task in Gu and Dao 2023, "Mamba"
    (arXiv:2312.00752), section 4.1.2 and appendix E.1: trained at length 256 with 16 ids, the mark among them, and judged
    at lengths of 64 to 2^20. The first mark is equally likely at every place that leaves room for a symbol before the
    last. chance = 1 / symbols.
    """

    def __init__(self, *, length: int = 256, symbols: int = 15):
        at_least(3, length=length)
        at_least(1, symbols=symbols)
        self.length, self.symbols, self.mark = length, symbols, symbols
        self.words = [*(f"s{i}" for i in range(symbols)), "!"]
        self.seq_len, self.asked, self.chance = length, 1, 1 / symbols

    def row(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = random.integers(self.symbols, size=self.length), nothing_asked(self.length)
        first = random.integers(self.length - 2)
        inputs[[first, -1]] = self.mark
        targets[-1] = inputs[first + 1]
        return inputs, targets

    def oracle(self, inputs: Tensor) -> Tensor:
        after = torch.cat([torch.zeros_like(inputs[:, :1]), inputs[:, :-1]], dim=1) == self.mark  # (B, T) follows a mark
        found = torch.full_like(inputs, IGNORE)
        found[:, -1] = torch.where(after, inputs, 0).sum(1)
        return found

    def plausible(self, inputs: Tensor) -> Tensor:
        return torch.arange(self.symbols).expand(len(inputs), -1)
