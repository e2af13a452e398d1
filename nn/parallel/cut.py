"""Parameters of which each process holds a part (DTensors). Plain tensors are their own part."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(x: Tensor) -> Tensor:
    """What this process holds of x: the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x


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
