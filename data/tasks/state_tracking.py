"""State tracking: the running product of a word of group elements, asked at every position.

Merrill et al. 2024, "The Illusion of State in State-Space Models" (arXiv:2404.08819), with its groups: what a
layer's kind of recurrence can follow at any length depends on the group. Parity and S3 are solvable: fixed depth reaches
them in parallel. A5 and S5 are not: their word problem is complete for NC1, beyond what transformers and linear state-space
models of a fixed depth can do; one nonlinear recurrent layer can.

The elements are permutations of places 0 … n-1: element x moves what lies at place p to place x[p]. The state after t
tokens is x_t o … o x_1 (o: the right one first), itself an element; it starts as the identity. That later ones stand on the
left is a choice, as is that elements are numbered in the order of their tuples. The state is uniform at every position, so
chance = 1 / |G|; one who follows only the first k of T tokens gets (k + (T - k) / |G|) / T.
"""

from functools import cached_property
from itertools import accumulate, permutations

import numpy as np
import torch
from torch import Tensor

from data.tasks.task import Task, at_least


def even(permutation: tuple[int, ...]) -> bool:
    swapped = [a > b for i, a in enumerate(permutation) for b in permutation[i + 1 :]]
    return sum(swapped) % 2 == 0


class StateTracking(Task):
    """The word problem of a group of permutations, `elements`, in order; the identity comes first."""

    elements: list[tuple[int, ...]]

    def __init__(self, *, length: int = 32):
        at_least(1, length=length)
        self.length = self.seq_len = self.asked = length
        self.words = ["".join(map(str, x)) for x in self.elements]
        self.chance = 1 / len(self.elements)

    @cached_property
    def products(self) -> list[list[int]]:
        """products[state][x]: the state after element x."""
        number = {x: n for n, x in enumerate(self.elements)}
        return [[number[tuple(x[place] for place in state)] for x in self.elements] for state in self.elements]

    def row(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        word = random.integers(len(self.elements), size=self.length)
        states = accumulate(word.tolist(), lambda state, x: self.products[state][x])
        return word, np.array(list(states), np.int64)

    def oracle(self, inputs: Tensor) -> Tensor:
        moves = torch.tensor(self.elements)  # (G, n)
        places = moves.shape[1]
        lying = torch.arange(places).repeat(len(inputs), 1)  # (B, n): which thing lies at each place
        found = []
        for x in inputs.T:  # things are moved about; where each has come to is the state
            lying = torch.empty_like(lying).scatter_(1, moves[x], lying)
            found.append((lying.argsort(1)[:, None] == moves).all(2).int().argmax(1))
        return torch.stack(found, dim=1)

    def plausible(self, inputs: Tensor) -> Tensor:
        return torch.arange(len(self.elements)).expand(len(inputs), -1)


class Parity(StateTracking):
    """State tracking, the running parity of bits: the group S2, whose word problem is the simplest there is."""

    elements = list(permutations(range(2)))

    def __init__(self, *, length: int = 32):
        super().__init__(length=length)
        self.words = ["0", "1"]  # a 1 swaps the two, a 0 leaves them


class S3(StateTracking):
    """State tracking, the six permutations of three: the smallest group whose order of factors matters."""

    elements = list(permutations(range(3)))


class A5(StateTracking):
    """State tracking, the 60 even permutations of five: the smallest group that is not solvable."""

    elements = [x for x in permutations(range(5)) if even(x)]


class S5(StateTracking):
    """State tracking, all 120 permutations of five: following five cups that are moved about."""

    elements = list(permutations(range(5)))
