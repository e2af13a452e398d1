import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORE
from data.tasks.task import Task, at_least, nothing_asked


class MultiQueryRecall(Task):
    """Multi-query associative recall: pairs of a key and a value, then each key once more: which value was its own?

        k3 v1 k0 v7 k3 _ _ _ k0 _        the answers: v1 at the second k3, v7 at the second k0

    Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv:2312.04927), as
    their code makes it. Keys of a row differ, and so do its values. Behind the pairs lie places two apart; place g = 0, 1, … is
    drawn for a query with weight (g + 1)^(power - 1), without repetition: distances follow a power law, as those of
    repeated words in text do. Zoology has power 0.01, 8192 ids of which half are values, lengths of 64 to 512 and 4 to 64
    pairs; the small vocabularies here, the filler `_` instead of random ids, and that the places are given to the keys in
    random order (so that a place says nothing about its key) are choices of this file.

    chance = 1 / pairs, a guess among the values of the row: who knows no values but which there are gets 1 / values.
    """

    def __init__(self, *, length: int = 64, pairs: int = 4, keys: int = 64, values: int = 64, power: float = 0.01):
        at_least(1, pairs=pairs)
        at_least(4 * pairs, length=length)  # the places of the queries must be as many as the pairs
        for name, size in (("keys", keys), ("values", values)):
            if size < pairs:
                raise ValueError(f"{name}: {size} are too few for {pairs} pairs that differ")
        if not 0 <= power < float("inf"):
            raise ValueError(f"power: {power} is not a number from 0")
        self.length, self.pairs, self.keys, self.values, self.power = length, pairs, keys, values, power
        self.words = ["_", *(f"k{i}" for i in range(keys)), *(f"v{i}" for i in range(values))]
        self.seq_len, self.asked, self.chance = length, pairs, 1 / pairs
        weight = np.arange(1, length // 2 - pairs + 1) ** (power - 1.0)
        self.weight = weight / weight.sum()

    def row(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        keys = 1 + random.choice(self.keys, self.pairs, replace=False)
        values = 1 + self.keys + random.choice(self.values, self.pairs, replace=False)
        places = random.permutation(random.choice(len(self.weight), self.pairs, replace=False, p=self.weight))
        inputs, targets = np.zeros(self.length, np.int64), nothing_asked(self.length)
        inputs[0 : 2 * self.pairs : 2], inputs[1 : 2 * self.pairs : 2] = keys, values
        asked = 2 * (self.pairs + places)
        inputs[asked], targets[asked] = keys, values
        return inputs, targets

    def oracle(self, inputs: Tensor) -> Tensor:
        told = inputs[:, : 2 * self.pairs].unflatten(1, (self.pairs, 2))  # (B, pairs, 2): key and value
        same = inputs[:, :, None] == told[:, None, :, 0]  # (B, T, pairs)
        found = torch.where(same, told[:, None, :, 1], 0).sum(2)
        found[:, : 2 * self.pairs] = IGNORE
        return torch.where(found == 0, IGNORE, found)

    def plausible(self, inputs: Tensor) -> Tensor:
        return inputs[:, 1 : 2 * self.pairs : 2]
