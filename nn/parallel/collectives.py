"""Collective operations that gradients pass through. The backward pass of each is its transpose.

    gather          parts of all ranks, one behind the other      backward: scatter_sum
    scatter_sum     the sum over ranks, of which each gets a part  backward: gather
    exchange        rows to other ranks, rows from them            backward: back again

With P ranks, a rank sends (P - 1) / P of the whole in the first two, and of its own rows in the third. `Passing` is without a
gradient: a tensor goes to one rank while another comes. `sent` counts the bytes that this process has sent to others, `waited`
the seconds that it has stood in these operations (on a GPU, which goes on by itself, those of starting them).
"""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

sent: Counter[str] = Counter()  # by the name of the operation, both passes together
waited = {"seconds": 0.0}

# By their names of PyTorch 2.13, or by those of before
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@contextmanager
def waiting() -> Iterator[None]:
    """What is done in it is waiting for other processes, and counted as such."""
    began = time.perf_counter()
    yield
    waited["seconds"] += time.perf_counter() - began


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return summed_parts(dy, ctx.group), None


class ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        return summed_parts(x, group)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return gathered(dy, ctx.group), None


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, send: list[int], receive: list[int], group) -> Tensor:
        ctx.sizes = send, receive, group
        return exchanged(x, send, receive, group)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, group = ctx.sizes
        return exchanged(dy, receive, send, group), None, None, None


def gather(x: Tensor, group: dist.ProcessGroup, dim: int = 0) -> Tensor:
    """x of every rank, one behind the other along `dim`: n numbers there become P n."""
    return Gather.apply(x.movedim(dim, 0), group).movedim(0, dim)


def scatter_sum(x: Tensor, group: dist.ProcessGroup, dim: int = 0) -> Tensor:
    """The P-th part along `dim` of the sum of all ranks' x."""
    return ScatterSum.apply(x.movedim(dim, 0), group).movedim(0, dim)


def exchange(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """The first send[0] rows of x to rank 0, the next to rank 1, …; receive[p] rows from rank p, in the order of ranks."""
    return Exchange.apply(x, send, receive, group)


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    y = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
    sent["gather"] += x.nbytes * (dist.get_world_size(group) - 1)
    with waiting():
        all_gather(y, x.contiguous(), group=group)
    return y


def summed_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    y = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    sent["scatter_sum"] += x.nbytes - y.nbytes
    with waiting():
        reduce_scatter(y, x.contiguous(), group=group)
    return y


def exchanged(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    y = x.new_empty(sum(receive), *x.shape[1:])
    sent["exchange"] += (sum(send) - send[dist.get_rank(group)]) * math.prod(x.shape[1:]) * x.element_size()
    with waiting():
        dist.all_to_all_single(y, x.contiguous(), receive, send, group=group)
    return y


@torch._disable_dynamo  # torch.compiler.disable, but imports the compiler only when it is called
def add_up(x: Tensor, group: dist.ProcessGroup | None) -> None:
    """In place: the sum of all ranks' x. Without a gradient, and not counted in `sent`."""
    with waiting():
        dist.all_reduce(x, group=group)


class Passing:
    """x on its way to the rank `to` of a group while a tensor of the same shape is on its way here from the rank `origin`."""

    def __init__(self, x: Tensor, to: int, origin: int, group: dist.ProcessGroup):
        self.leaving, self.coming = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        ways = (dist.isend, self.leaving, to), (dist.irecv, self.coming, origin)
        self.works = dist.batch_isend_irecv([dist.P2POp(way, y, group=group, group_peer=rank) for way, y, rank in ways])
        sent["pass"] += x.nbytes

    def arrived(self) -> Tensor:
        with waiting():
            for work in self.works:
                work.wait()
        return self.coming
