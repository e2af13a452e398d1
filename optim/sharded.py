"""Parameters of which each process holds a part (DTensors), as the optimizers see them. Plain tensors are their own part."""

import logging

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # two messages do


def local(x: Tensor) -> Tensor:
    """What this process holds of x: the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor, like: Tensor) -> Tensor:
    """All of it, where x is this process's part of a tensor cut as `like` is. Every process calls this in the same order."""
    if not isinstance(like, DTensor):
        return x
    options = dict(shape=like.shape, stride=like.stride(), run_check=False)
    return DTensor.from_local(x, like.device_mesh, like.placements, **options).full_tensor()


def part(x: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have, cut as `like` is."""
    return local(cut_as(x, like)) if isinstance(like, DTensor) else x


def cut_as(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that all processes have, cut as `like` is: a DTensor if that is one, on its device."""
    x = x.to(local(like).device)
    if not isinstance(like, DTensor):
        return x.clone()
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
