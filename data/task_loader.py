"""From a task to batches: endless rows for training, the same few for evaluation.

Letters: B rows of a batch, T tokens of a row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from data.loader import Batch
from data.tasks import TRAINING, VALIDATION, Task

EXAMPLES = 512  # rows of an evaluation that nobody limits


class TaskLoader:
    """Endless batches of a task for training: deterministic from `seed`, resumable at any batch, shared out among ranks.

    Rows are numbered through the run, as those of `Loader` are: batch n of all ranks together is rows n * R to
    (n + 1) * R - 1 where R = batch_size * world_size, and rank r takes the r-th batch_size of them. No row comes twice.

    Raises ValueError if an argument is out of range.
    """

    def __init__(self, task: Task, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; with world_size {world_size} it must be 0 to {world_size - 1}")
        self.task, self.batch_size, self.seed = task, batch_size, seed
        self.rank, self.world_size, self.row = rank, world_size, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self.row + self.rank * self.batch_size
        inputs, targets = self.task.batch(self.batch_size, seed=self.seed, first=first, stream=TRAINING)
        self.row += self.batch_size * self.world_size
        return as_batch(inputs, targets)

    def state_dict(self) -> dict[str, int | str]:
        """The row where the next batch begins, and what it is a row of. The same on every rank."""
        return {"row": self.row, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go to the row of a `state_dict`; batch_size, rank and world_size may be other ones.

        Raises ValueError if it is of another seed or task, whose rows are others, or no such row.
        """
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise ValueError(f"loader state: {name} was {state.get(name)} and is {ours}; the rows are others")
        row = state.get("row")
        if not (isinstance(row, int) and row >= 0):
            raise ValueError(f"loader state: row {row} must be a whole number from 0")
        self.row = row

    def _identity(self) -> dict[str, int | str]:
        return {"seed": self.seed, "task": repr(self.task)}


def examples(task: Task, *, batch_size: int, count: int = EXAMPLES, limit: int | None = None, seed: int = 0) -> Iterator[Batch]:
    """The first `count` rows of a task's validation stream, in batches; no more than hold `limit` tokens, but one at least.

    The stream has a seed of its own, so that runs of any seed are judged on the same rows. They are drawn apart from those
    of the training; where a task has few sequences, as parity of a few bits, some are equal all the same.
    """
    for name, value in (("batch_size", batch_size), ("count", count)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    count = count if limit is None else min(count, -(-limit // task.seq_len))
    return (
        as_batch(*task.batch(min(batch_size, count - first), seed=seed, first=first, stream=VALIDATION))
        for first in range(0, count, batch_size)
    )


def as_batch(inputs: Tensor, targets: Tensor) -> Batch:
    """Rows of a task as a batch: each is one document."""
    return Batch(inputs, targets, torch.zeros(inputs.shape, dtype=torch.int32))
