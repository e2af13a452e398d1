import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORE
from data.tasks.task import Task, at_least, at_most, nothing_asked

ENTRIES = 3  # of the book that are said again: two as worked examples, one as the question


class Phonebook(Task):
    """Phonebook: names and numbers, two of the entries said again, then a name: what is its number?

        Ada Lim 4 1 7 / Bo Ray 0 0 3 / Cy Lim 2 9 9 / … / / Cy Lim 2 9 9 / Bo Ray 0 0 3 / / Ada Lim        the answer: 4 1 7

    Jelassi et al. 2024, "Repeat After Me" (arXiv:2402.01032), section 4, whose prompt this is; Waleffe et al. 2024, "An
    Empirical Study of Mamba-based Language Models" (arXiv:2406.07887). `reversed`: the name is also told before
    the book, so a model of fixed state knows what to keep. Digits are asked one by one, each with the right ones before it:
    all of them right is what greedy decoding writes. The papers ask pretrained models with 7 to 10 digits in text; here a
    name is a first and a last one of `names` each, which many entries may share while no two share both, and a token is a
    digit, a name or a line's end: choices, as is the form of the line that announces the name. chance = 1 / 10.
    """

    def __init__(self, *, pairs: int = 10, digits: int = 4, names: int = 16, reversed: bool = False):
        at_least(ENTRIES, pairs=pairs)
        at_least(1, digits=digits, names=names)
        at_most(names**2, f"{names} first and last names make {names**2}", pairs=pairs)
        self.pairs, self.digits, self.names, self.reversed = pairs, digits, names, reversed
        first, last = (f"First{i}" for i in range(names)), (f"Last{i}" for i in range(names))
        self.words = [*"0123456789", *first, *last, "/", "?"]
        self.end, self.mark = len(self.words) - 2, len(self.words) - 1
        line = digits + 3
        self.seq_len = 4 * reversed + (pairs + 2) * line + 2 + 2 + digits - 1
        self.asked, self.chance = digits, 1 / 10

    def row(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        first, last = np.divmod(random.choice(self.names**2, self.pairs, replace=False), self.names)
        numbers = random.integers(10, size=(self.pairs, self.digits))
        names = np.stack([10 + first, 10 + self.names + last], axis=1)  # (pairs, 2)
        book = np.insert(np.hstack([names, numbers]), self.digits + 2, self.end, axis=1)  # (pairs, line)
        one, other, asked = random.choice(self.pairs, ENTRIES, replace=False)

        announced = [self.mark, *names[asked], self.end] if self.reversed else []
        examples = [self.end, *book[one], *book[other], self.end]
        inputs = np.array([*announced, *book.flat, *examples, *names[asked], *numbers[asked, :-1]], np.int64)
        targets = nothing_asked(self.seq_len)
        targets[-self.digits :] = numbers[asked]
        return inputs, targets

    def oracle(self, inputs: Tensor) -> Tensor:
        found = torch.full_like(inputs, IGNORE)
        for row, ids in enumerate(inputs.tolist()):
            lines, line = {}, []
            for i in ids[: -self.digits + 1 or None]:  # up to the name that is asked for
                if i == self.end:
                    lines[tuple(line[:2])] = line[2:]
                line = [] if i == self.end else [*line, i]
            found[row, -self.digits :] = torch.tensor(lines[tuple(line)])
        return found

    def plausible(self, inputs: Tensor) -> Tensor:
        return torch.arange(10).expand(len(inputs), -1)
