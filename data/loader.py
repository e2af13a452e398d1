"""From a stream of tokens to batches: random windows for training, windows in order for evaluation.

Letters: B rows of a batch, T tokens of a row. A window is T + 1 tokens: the inputs are all but its last, the targets
all but its first. Windows follow each other T apart, so every token is a target once and the one they share is the last
target of one and the first input of the next.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.tokens import Tokens

IGNORE = -100  # a target that does not count: the ignore_index of torch's cross_entropy


class Batch(NamedTuple):
    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64: the token after each input, or IGNORE
    documents: Tensor  # (B, T) int32: which document of its row an input belongs to, counted from 0

    def told(self, *, packed: bool) -> dict[str, Tensor]:
        """What a model is told beside inputs and targets, by the names of its arguments; of documents only where `packed`."""
        return dict(documents=self.documents) if packed else {}


class DomainBatch(NamedTuple):
    """A batch of text whose kinds are told apart."""

    inputs: Tensor
    targets: Tensor
    documents: Tensor
    domains: Tensor  # (B, T) int64: the kind of text an input is of

    def told(self, *, packed: bool) -> dict[str, Tensor]:
        return Batch(*self[:3]).told(packed=packed) | dict(domains=self.domains)


class Loader:
    """Endless batches for training: deterministic from `seed`, resumable at any batch, shared out among ranks.

    Each epoch lays windows over the stream from a random offset below T and visits each once in random order; both are
    drawn from (seed, epoch). Rows are numbered through the run: batch n of all ranks together is rows n * R to
    (n + 1) * R - 1 where R = batch_size * world_size, and rank r takes the r-th batch_size of them. So the rows of a
    step depend on R alone, and a run may go on with another batch size or another number of ranks without a row lost.

    tokens: the stream; batch_size: rows of this rank; seq_len: T. Raises ValueError if the stream is shorter than one
    window or an argument is out of range.
    """

    def __init__(self, tokens: Tokens, *, batch_size: int, seq_len: int, seed: int, rank: int = 0, world_size: int = 1):
        _check(tokens, batch_size, seq_len)
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; with world_size {world_size} it must be 0 to {world_size - 1}")
        self.tokens, self.batch_size, self.seq_len, self.seed = tokens, batch_size, seq_len, seed
        self.rank, self.world_size = rank, world_size
        self._begin(epoch=0)

    def _begin(self, epoch: int, position: int = 0) -> None:
        """Draw the epoch's windows: `self.order` holds where each begins in the stream, in the order of visiting."""
        random = np.random.default_rng([self.seed, epoch])
        offset = random.integers(min(self.seq_len, len(self.tokens) - self.seq_len))
        windows = (len(self.tokens) - 1 - offset) // self.seq_len
        self.order = random.permutation(windows) * self.seq_len + offset
        self.epoch, self.position = epoch, position

    def _next_rows(self, rows: int) -> np.ndarray:
        """Where the next windows begin, (rows,), moving on to the following epochs as this one runs out."""
        taken = []
        while rows:
            if self.position == len(self.order):
                self._begin(self.epoch + 1)
            taken.append(self.order[self.position : self.position + rows])
            self.position += len(taken[-1])
            rows -= len(taken[-1])
        return np.concatenate(taken)

    def __iter__(self) -> Iterator[Batch | DomainBatch]:
        return self

    def __next__(self) -> Batch | DomainBatch:
        begins = self._next_rows(self.batch_size * self.world_size)
        return _gather(self.tokens, begins[self.rank * self.batch_size :][: self.batch_size], self.seq_len)

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins, and what that position refers to. The same on every rank."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the position of a `state_dict`; batch_size, rank and world_size may be other ones.

        Raises ValueError if it is of another seed, seq_len or stream, whose windows are others, or no such position.
        """
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise ValueError(f"loader state: {name} was {state.get(name)} and is {ours}; the windows are others")
        epoch, position = state.get("epoch"), state.get("position")
        if not (isinstance(epoch, int) and isinstance(position, int) and epoch >= 0 and position >= 0):
            raise ValueError(f"loader state: epoch {epoch} and position {position} must be whole numbers from 0")
        self._begin(epoch, position)
        if position > len(self.order):
            raise ValueError(f"loader state: position {position} in an epoch of {len(self.order)} windows")

    def _identity(self) -> dict[str, int]:
        return {"seed": self.seed, "seq_len": self.seq_len, "tokens": len(self.tokens)}


def windows(tokens: Tokens, *, batch_size: int, seq_len: int, limit: int | None = None) -> Iterator[Batch | DomainBatch]:
    """Batches for evaluation, in order: every token but the first is a target exactly once.

    The last window is filled up with inputs 0 and targets IGNORE; the last batch may have fewer rows. `limit` takes
    only ceil(limit / T) windows, spread evenly over the stream. Raises ValueError for a stream of fewer than 2 tokens,
    at the call rather than at the first batch.
    """
    _check(tokens, batch_size, seq_len, least=2)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1 token")
    total = -(-(len(tokens) - 1) // seq_len)
    chosen = total if limit is None else min(total, -(-limit // seq_len))
    begins = np.arange(chosen) * total // chosen * seq_len
    return (_gather(tokens, begins[n : n + batch_size], seq_len) for n in range(0, chosen, batch_size))


def _gather(tokens: Tokens, begins: np.ndarray, seq_len: int) -> Batch | DomainBatch:
    """The windows that begin at `begins` (B,), as a batch. What lies beyond the end of the stream is IGNORE."""
    index = begins[:, None] + np.arange(seq_len + 1)  # (B, T + 1)
    beyond = index >= len(tokens)
    ids = tokens.ids[np.minimum(index, len(tokens) - 1)].astype(np.int64)
    ids[beyond] = IGNORE
    inputs, targets = ids[:, :-1], ids[:, 1:]

    # Documents that begin inside a row, after its first token: mark where they do, then count the marks from the left.
    first = np.searchsorted(tokens.starts, begins, side="right")
    count = np.searchsorted(tokens.starts, begins + seq_len) - first  # (B,) marks in each row
    row = np.repeat(np.arange(len(begins)), count)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)  # 0, 1, ... within each row
    documents = np.zeros(inputs.shape, np.int32)
    documents[row, tokens.starts[first[row] + nth] - begins[row]] = 1
    np.cumsum(documents, axis=1, out=documents)

    batch = Batch(
        torch.from_numpy(np.where(inputs == IGNORE, 0, inputs)),
        torch.from_numpy(np.ascontiguousarray(targets)),
        torch.from_numpy(documents),
    )
    if tokens.domains is None:
        return batch
    return DomainBatch(*batch, torch.from_numpy(np.searchsorted(tokens.domains, index[:, :-1], side="right") - 1))


def _check(tokens: Tokens, batch_size: int, seq_len: int, least: int | None = None) -> None:
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    least = least or seq_len + 1
    if len(tokens) < least:
        raise ValueError(f"tokens: the stream has {len(tokens)}, a window of seq_len {seq_len} needs {least}")
