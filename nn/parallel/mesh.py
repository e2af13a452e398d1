"""The processes of a run as a mesh: a name and a size for each way in which they share the work.

    torchrun --nproc-per-node 8 train.py --mesh "fsdp=4,tp=2"

Ranks count through the axes in the order of AXES, the last one fastest: what talks most, tp, are neighbours on one machine.
"""

import math

import numpy as np

AXES = {
    "pp": "pipeline: each rank has a part of the layers",
    "dp": "data: each rank has all of the model and its own rows",
    "ep": "data, each rank keeping a share of the experts",
    "fsdp": "data, each rank keeping a share of every weight, gradient and optimizer state",
    "ring": "each rank has a share of the positions of a row, keys and values going round",
    "ulysses": "each rank has a share of the positions and, within attention, of the heads",
    "tp": "each rank has a share of the heads and of the ffns' neurons, and of the positions between them",
}
ROWS = ("dp", "ep", "fsdp")  # axes whose ranks read rows of their own; along the others they read the same


def parse_mesh(text: str) -> dict[str, int]:
    """`"fsdp=4,tp=2"` -> the size of every axis, in the order of AXES; 1 where it is not named.

    ValueError for an axis that does not exist or is named twice, or a size that is no positive whole number.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise ValueError(f"mesh: there is no axis {name!r} in {text!r}; there are {', '.join(AXES)}, as in fsdp=4,tp=2")
        if name in sizes:
            raise ValueError(f"mesh: the axis {name} is named twice in {text!r}")
        if not (size.isascii() and size.isdigit() and 1 <= int(size) <= 10**6):
            raise ValueError(f"mesh: {part.strip()!r} has no size that is a whole number from 1 on, as in fsdp=4,tp=2")
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def sizes_of(text: str, world: int) -> dict[str, int]:
    """The sizes of all axes for `world` processes; "" is data parallelism over all. ValueError where they do not multiply."""
    sizes = parse_mesh(text or f"dp={world}")
    if math.prod(sizes.values()) != world:
        named = ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one process"
        needed, there = math.prod(sizes.values()), "is 1" if world == 1 else f"are {world}"
        raise ValueError(f"mesh: {named} needs {needed} processes, but there {there}; torchrun --nproc-per-node says how many")
    return sizes


def share_of_rows(rank: int, sizes: dict[str, int]) -> tuple[int, int]:
    """(which share of a batch's rows a process reads, how many shares there are)."""
    share, shares = 0, 1
    for name, index in zip(sizes, np.unravel_index(rank, tuple(sizes.values())), strict=True):
        if name in ROWS:
            share, shares = share * sizes[name] + int(index), shares * sizes[name]
    return share, shares
