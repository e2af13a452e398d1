import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORE
from data.tasks.task import Task, at_least, nothing_asked


class SelectiveCopying(Task):
    """Selective copying: symbols scattered among noise, then asked for in their order.

        . . c . a . . a . ? ? ?        the answers: c a a

    Gu and Dao 2023, "Mamba" (arXiv:2312.00752), section 4.1.1 and appendix E.1, after the denoising task of Jing et al.
    2019, "Gated Orthogonal Recurrent Units" (arXiv:1706.02761). What is to be remembered depends on the content: a layer
    whose weights do not see its input cannot tell symbols from noise at places that change. Mamba's setting is
    length=4096:symbols=14:count=16, 16 ids in all; the shorter default length and that `length` counts the question marks
    too are choices of this file. chance = 1 / symbols.
    """

    def __init__(self, *, length: int = 256, symbols: int = 14, count: int = 16):
        at_least(1, symbols=symbols, count=count)
        at_least(2 * count, length=length)
        self.length, self.symbols, self.count = length, symbols, count
        self.noise, self.mark = symbols, symbols + 1
        self.words = [*(f"s{i}" for i in range(symbols)), ".", "?"]
        self.seq_len, self.asked, self.chance = length, count, 1 / symbols

    def row(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        told = self.length - self.count  # tokens before the question marks
        symbols = random.integers(self.symbols, size=self.count)
        inputs, targets = np.full(self.length, self.noise, np.int64), nothing_asked(self.length)
        inputs[np.sort(random.choice(told, self.count, replace=False))] = symbols
        inputs[told:], targets[told:] = self.mark, symbols
        return inputs, targets

    def oracle(self, inputs: Tensor) -> Tensor:
        found = torch.full_like(inputs, IGNORE)
        for row, ids in enumerate(inputs.tolist()):
            waiting = []
            for place, i in enumerate(ids):  # a queue: symbols go in, question marks take them out
                if i < self.symbols:
                    waiting.append(i)
                elif i == self.mark and waiting:
                    found[row, place] = waiting.pop(0)
        return found

    def plausible(self, inputs: Tensor) -> Tensor:
        return torch.arange(self.symbols).expand(len(inputs), -1)
