"""A task: sequences made by a rule, in which some positions ask for an answer that can be known.

Letters: B rows of a batch, T tokens of a row, P answers that are plausible.
"""

import inspect
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORE

TRAINING, VALIDATION = 0, 1  # streams of rows: no row of one is drawn as a row of the other


class Task(ABC):
    """What every task is. A task says `words`, `seq_len`, `asked` and `chance`, makes a `row`, and has an `oracle`.

    words: how each id of the task's own vocabulary is spelled. seq_len: T. asked: positions of a row that ask, the same
    number in each. chance: the accuracy of one who guesses uniformly among `plausible`. Options are the keyword arguments
    of the constructor, kept as attributes of the same names; a bad one is a ValueError that names it.
    """

    words: list[str]
    seq_len: int
    asked: int
    chance: float

    @abstractmethod
    def row(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One sequence: inputs (T,) and targets (T,), int64; IGNORE where nothing is asked."""

    @abstractmethod
    def oracle(self, inputs: Tensor) -> Tensor:
        """The answers (B, T) found from inputs (B, T) alone, by another way than `row` makes them; elsewhere anything.

        What it says at a position does not depend on the inputs after it: a causal model can know it, too.
        """

    @abstractmethod
    def plausible(self, inputs: Tensor) -> Tensor:
        """For each row of inputs (B, T) the ids (B, P) that an answer can be, for one who has not found out which."""

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def batch(self, rows: int, *, seed: int, first: int = 0, stream: int = TRAINING) -> tuple[Tensor, Tensor]:
        """Rows `first` to first + rows - 1 of a stream: inputs and targets (rows, T) int64.

        Each row is drawn from (stream, its number, seed) alone, so it is the same in whatever batch it stands.
        """
        made = [self.row(np.random.default_rng([stream, first + n, seed])) for n in range(rows)]
        inputs, targets = (torch.from_numpy(np.stack(part)) for part in zip(*made, strict=True))
        return inputs, targets

    def spell(self, ids: Tensor) -> str:
        """Ids (T,) as text; one that is not of this vocabulary in angle brackets."""
        return " ".join(self.words[i] if 0 <= i < len(self.words) else f"<{i}>" for i in ids.tolist())

    def __repr__(self) -> str:
        names = inspect.signature(type(self)).parameters
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def nothing_asked(length: int) -> np.ndarray:
    """Targets (length,) that ask for nothing yet."""
    return np.full(length, IGNORE, np.int64)


def at_least(least: int, **options: int) -> None:
    """ValueError naming the first of the options that is smaller than `least`."""
    for name, value in options.items():
        if value < least:
            raise ValueError(f"{name}: {value} is too small; at least {least}")


def at_most(most: int, reason: str, **options: int) -> None:
    """ValueError naming the first of the options that is larger than `most`, and why that is the limit."""
    for name, value in options.items():
        if value > most:
            raise ValueError(f"{name}: {value} is too large; {reason}, so at most {most}")
