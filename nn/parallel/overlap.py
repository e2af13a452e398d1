"""Tensor parallelism whose messages travel while products are computed: the rows of a rank's neighbours arrive one by one.

Jiang et al. 2024, "MegaScale: Scaling Large Language Model Training to More Than 10,000 GPUs" (arXiv:2402.15627), section 3.2:
the all-gather before the first products of a layer and the reduce-scatter behind its last one are cut into chunks that are
sent while others are multiplied. Here a chunk is what one rank has of the row, and they go round a ring of the P ranks:

    reads     y = gather(x) W^T    multiply the chunk that is here, while it goes on to the next rank and another one comes
    writes    y = scatter_sum(h W^T)    make the summand of a chunk, while the sum of the others' is on its way

Each is the other's backward pass. Bytes sent are those of the plain operations, (P - 1) / P of the row each way; P - 1 messages
and P products stand in the place of one. (Sublayers that are run again, by --backprop checkpoint, then send the sum of `writes`
again too, which otherwise is not needed.) Used for attention and for ffns whose whole input goes through linear layers.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nn.attention.gqa import GQA
from nn.ffn import GLU, MLP
from nn.linear import Linear, cast_once
from nn.parallel.collectives import Passing

# B batch, T positions of the row, S = T / P positions of a rank, C width of the stream, F width of what is shared out

READS = {GQA: ("query", "key", "value", "gate"), GLU: ("gate", "up"), MLP: ("up",)}
WRITES = {GQA: "out", GLU: "down", MLP: "down"}


def go_round(x: Tensor, group: dist.ProcessGroup, use: Callable[[int, Tensor], None]) -> None:
    """Call `use(rank, its x)` for every rank of the group, the own one first, while the next one's is under way."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for step in range(size):
        passing = Passing(x, (rank + 1) % size, (rank - 1) % size, group) if step < size - 1 else None
        use((rank - step) % size, x)
        x = passing.arrived() if passing else x


def sum_round(make: Callable[[int], Tensor], group: dist.ProcessGroup, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
    """The sum over all ranks of what each of them makes for this one, `make(rank)`; one is made while others' travel.

    `meanwhile()` is done while the last one is under way.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    passing = None
    for step in range(1, size + 1):  # what is for the rank before this one has the longest way
        total = make((rank - step) % size)
        if step == size:
            meanwhile()
        total = total + passing.arrived() if passing else total
        passing = Passing(total, (rank + 1) % size, (rank - 1) % size, group) if step < size else None
    return total


class Reads(torch.autograd.Function):
    """x (B, S, C) of a rank, weights (F, C) each -> (B, T, F) each."""

    @staticmethod
    def forward(ctx, x: Tensor, group, *weights: Tensor) -> tuple[Tensor, ...]:
        B, S, C = x.shape
        size = dist.get_world_size(group)
        row, made = x.new_empty(B, size * S, C), [x.new_empty(B, size * S, len(W)) for W in weights]

        def use(rank: int, chunk: Tensor) -> None:
            at = slice(rank * S, (rank + 1) * S)
            row[:, at] = chunk
            for y, W in zip(made, weights, strict=True):
                y[:, at] = chunk @ W.T

        go_round(x, group, use)
        ctx.group, ctx.count = group, S
        ctx.save_for_backward(row, *weights)
        return tuple(made)

    @staticmethod
    def backward(ctx, *dys: Tensor) -> tuple:
        row, *weights = ctx.saved_tensors
        S, grads = ctx.count, []

        def make(rank: int) -> Tensor:
            return sum(dy[:, rank * S : (rank + 1) * S] @ W for dy, W in zip(dys, weights, strict=True))

        def of_weights() -> None:
            grads.extend(dy.flatten(0, 1).T @ row.flatten(0, 1) for dy in dys)

        return sum_round(make, ctx.group, of_weights), None, *grads


class Writes(torch.autograd.Function):
    """h (B, T, F) of a rank's heads or neurons, weight (C, F) -> (B, S, C), summed over ranks."""

    @staticmethod
    def forward(ctx, h: Tensor, group, weight: Tensor) -> Tensor:
        S = h.shape[1] // dist.get_world_size(group)
        ctx.group = group
        ctx.save_for_backward(h, weight)
        return sum_round(lambda rank: h[:, rank * S : (rank + 1) * S] @ weight.T, group)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        h, weight = ctx.saved_tensors
        S, dh, row = dy.shape[1], torch.empty_like(h), dy.new_empty(len(h), h.shape[1], dy.shape[2])

        def use(rank: int, chunk: Tensor) -> None:
            at = slice(rank * S, (rank + 1) * S)
            row[:, at] = chunk
            dh[:, at] = chunk @ weight

        go_round(dy.contiguous(), ctx.group, use)
        return dh, None, row.flatten(0, 1).T @ h.flatten(0, 1)


class Reader:
    """What the linear layers that read the stream call: the first of them computes the products of all."""

    def __init__(self, layers: list[Linear], group: dist.ProcessGroup):
        self.layers, self.group, self.made = layers, group, {}
        for layer in layers:
            layer.forward = lambda x, layer=layer: self.read(x, layer)

    def read(self, x: Tensor, layer: Linear) -> Tensor:
        """(B, S, C) -> (B, T, F)."""
        if layer is self.layers[0]:
            x = cast_once(x)
            made = Reads.apply(x, self.group, *(each.weight.to(x.dtype) for each in self.layers))
            self.made = dict(zip(self.layers, made, strict=True))
        y = self.made.pop(layer)
        return y if layer.bias is None else y + layer.bias.to(y.dtype)


def overlap(layer: nn.Module, group: dist.ProcessGroup) -> bool:
    """In place, if it is a layer that can: it takes a rank's own positions (B, S, C) and gives the sum over ranks for them.

    The rest of its context stays that of the row. Whether it can: no layers beside it, no adapters at its matrices.
    """
    kind = next((kind for kind in READS if isinstance(layer, kind) and type(layer).forward is kind.forward), None)
    if kind is None:
        return False
    reads = [each for name in READS[kind] if (each := getattr(layer, name)) is not None]
    write = getattr(layer, WRITES[kind])
    if not all(type(each) is Linear and each.adapter is None for each in (*reads, write)):
        return False

    def written(h: Tensor) -> Tensor:
        h = cast_once(h)
        y = Writes.apply(h, group, write.weight.to(h.dtype))
        return y if write.bias is None else y + write.bias.to(y.dtype)

    Reader(reads, group)
    write.forward = written
    return True
