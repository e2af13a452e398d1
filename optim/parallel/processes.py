"""The processes of a run: joining them, leaving them, agreeing among them. With a single process nothing is done."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist


def join_processes() -> tuple[int, int]:
    """(rank, number of processes) as torchrun set them; (0, 1) without it."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    store, rank, world = next(dist.rendezvous("env://"))
    if count := restarts():  # what processes said of themselves before they died must not be read again
        store = dist.PrefixStore(f"restart {count}", store)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=world)
    return dist.get_rank(), dist.get_world_size()


def restarts() -> int:
    """How often torchrun has started all processes of the run anew, one of them having died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def lost_touch(error: RuntimeError) -> bool:
    """Whether an error says that another process no longer answers."""
    words = str(error)
    return isinstance(error, dist.DistError) or "gloo/transport" in words or "onnection reset" in words or "roken pipe" in words


def leave_processes(status: int = 0) -> NoReturn:
    """`sys.exit(status)`, after whose success the processes part together.

    One of several ends without taking its interpreter apart: gloo's threads may still be letting go of tensors, and one that
    finds no interpreter to tell aborts the process (PyTorch 2.13, "terminate called without an active exception").
    """
    if not dist.is_initialized():
        sys.exit(status)
    if status == 0:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def first_rank_first(rank: int, world: int) -> Iterator[None]:
    """What the first process makes (a tokenizer, a cache), the others find made."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def agree(elapsed: float, stop: list[int], busy: bool, world: int) -> tuple[float, int, bool]:
    """The clock of the slowest process, the signal that any of them caught (0: none): all must end at one step; whether any
    is busy with something else.
    """
    state = torch.tensor([elapsed, stop[0] if stop else 0, busy], dtype=torch.float64)
    if world > 1:
        state = state.cuda() if torch.cuda.is_available() else state
        dist.all_reduce(state, dist.ReduceOp.MAX)
    return state[0].item(), int(state[1]), bool(state[2])


def summed(value: torch.Tensor, world: int) -> float:
    """The sum of a scalar over all processes."""
    if world > 1:
        dist.all_reduce(value)
    return value.item()
