"""Tensors of which each process holds a part (DTensors). A plain tensor is its own part."""

import logging

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

# It says that a tensor cut along two axes of a mesh takes two messages, each time.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def local(x: Tensor) -> Tensor:
    """What this process holds of x: the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor, like: Tensor) -> Tensor:
    """All of it, where x is this process's part of a tensor cut as `like` is. Every process calls this in the same order."""
    x = cut_like(x, like)
    return x.full_tensor() if isinstance(x, DTensor) else x


def cut_like(x: Tensor, like: Tensor) -> Tensor:
    """The tensor, cut as `like` is, of which this process's part is x: a DTensor if that is one."""
    if not isinstance(like, DTensor):
        return x
    options = dict(shape=like.shape, stride=like.stride(), run_check=False)
    return DTensor.from_local(x, like.device_mesh, like.placements, **options)


def part(x: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have, cut as `like` is, on its device."""
    if not isinstance(like, DTensor):
        return x
    x = x.to(local(like).device)
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None).to_local()


def cuts(x: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups among which x is cut: a sum over its numbers is the sum of the parts' over each of them."""
    if not isinstance(x, DTensor):
        return ()
    return tuple(x.device_mesh.get_group(dim) for dim, place in enumerate(x.placements) if not place.is_replicate())


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Of all numbers of all tensors, float32 (float64 if they are): one message for each way in which they are cut."""
    totals: dict[tuple[dist.ProcessGroup, ...], Tensor] = {}
    for x in tensors:
        mine = local(x)
        wide = mine.to(torch.promote_types(mine.dtype, torch.float32))
        square = torch.linalg.vector_norm(wide).square() if wide.numel() else wide.sum()
        totals[cuts(x)] = totals.get(cuts(x), 0) + square
    for groups, total in totals.items():
        for group in groups:
            dist.all_reduce(total, group=group)
    return sum(totals.values())
