"""The table between a published checkpoint and ours: one entry a tensor of theirs, read in either direction."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor


class Entry:
    """A tensor of theirs and the ones of ours that it holds, one after the other along axis 0; `transposed`: then turned.

    `heads`: one after the other within each of so many heads instead. `prefixed`: whether the family's prefix ("model.",
    say) stands before the name. One of ours may be a matrix of a stack: `up.weight#3` is the fourth of `up.weight`.
    """

    def __init__(self, theirs: str, *ours: str, transposed: bool = False, prefixed: bool = True, heads: int = 1):
        self.theirs, self.ours, self.transposed, self.prefixed, self.heads = theirs, ours, transposed, prefixed, heads

    def split(self, tensor: Tensor, rows: list[int]) -> list[Tensor]:
        """Theirs -> ours, of which each has so many rows."""
        if tensor.ndim == 0 or self.transposed and tensor.ndim != 2:
            raise ValueError(f"tensor {self.theirs!r} has the shape {tuple(tensor.shape)}: too few or too many axes")
        tensor = tensor.T if self.transposed else tensor
        if sum(rows) != len(tensor):
            raise ValueError(f"tensor {self.theirs!r} has {len(tensor)} rows, not {sum(rows)}")
        if self.heads > 1:
            tensor = rearrange(tensor, "(h n d) ... -> (n h d) ...", h=self.heads, n=len(rows))
        return [part.contiguous() for part in tensor.split(rows)]

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Ours -> theirs."""
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self.heads > 1:
            tensor = rearrange(tensor, "(n h d) ... -> (h n d) ...", h=self.heads, n=len(tensors))
        return tensor.T.contiguous() if self.transposed else tensor


class AddedRow(Entry):
    """A table of theirs of `count` rows, the first of which is added to each row of ours; written as zeros."""

    def __init__(self, theirs: str, ours: str, *, count: int):
        super().__init__(theirs, ours)
        self.count = count

    def split(self, tensor: Tensor, rows: list[int]) -> list[Tensor]:
        if tensor.ndim != 2 or len(tensor) != self.count:
            raise ValueError(f"tensor {self.theirs!r} has the shape {tuple(tensor.shape)}, not {self.count} rows")
        return [tensor[:1].expand(rows[0], -1)]

    def join(self, tensors: list[Tensor]) -> Tensor:
        return torch.zeros_like(tensors[0][:1]).repeat(self.count, 1)


def pick(tensors: dict[str, Tensor], name: str) -> Tensor:
    """One of ours by the name that an entry has for it."""
    name, _, matrix = name.partition("#")
    return tensors[name][int(matrix)] if matrix else tensors[name]


def stacked(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours by their own names: the matrices of a stack, which are taken out of `parts`, put together in its order."""
    whole = {}
    for name in list(parts):
        own, _, matrix = name.partition("#")
        if matrix:
            whole.setdefault(own, []).append(parts.pop(name))
        else:
            whole[name] = parts[name]
    for name, value in whole.items():
        if isinstance(value, list):
            whole[name] = torch.stack(value)
    return whole


def check_options(published: dict, supported: dict[str, Any], default: Any = None) -> None:
    """ValueError if config.json sets an option to something other than the (or one of the) supported values."""
    for key, values in supported.items():
        values = values if isinstance(values, tuple) else (values,)
        if published.get(key, default if default is not None else values[0]) not in values:
            raise ValueError(f"config.json: {key} = {published[key]!r} is not supported, only {', '.join(map(str, values))}")
