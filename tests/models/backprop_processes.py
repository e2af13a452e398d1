"""What each of two processes does in tests/models/test_backprop.py: half of a batch, by DDP and FSDP2, beside the whole.

torchrun --nproc-per-node 2 -m tests.models.backprop_processes
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from models.backprop.carry import carry_of
from nn.context import Context
from optim.parallel.processes import leave_processes
from tests.models.drawn import drawn

STACK = "gqa:kv_heads=1:window=7 swiglu:width=24 mamba2:state=4 moe:experts=3:width=10:scope={} gqa+mlp gqa mlp"


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients, none of them sharded."""
    found = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def check(spec: str, wrapping: str, rank: int, world: int) -> None:
    """Gradients of the halves, averaged, times the number of processes are those of the whole batch without a strategy."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(40, (world, 20), generator=generator)
    documents = (torch.rand(world, 20, generator=generator) < 0.2).long().cumsum(1)
    one, model = drawn(stack=STACK.format("micro")), drawn(stack=STACK.format("global"), backprop=spec)
    one(tokens, tokens.roll(-1, 1), documents=documents).backward() if rank == 0 else None
    if wrapping == "ddp":
        model = DistributedDataParallel(model)
    else:
        for sublayer in model.stack:
            fully_shard(sublayer)
        fully_shard(model)
    mine = slice(rank, rank + 1)
    spread = [carry_of(sublayer, Context(tokens, torch.arange(20))) for sublayer in getattr(model, "module", model).stack]
    assert spread == [carry_of(sublayer, Context(tokens, torch.arange(20))) for sublayer in one.stack]  # chunks as ever
    for _ in range(2):  # a second step, as gathered parameters were freed after the first
        model.zero_grad()
        model(tokens[mine], tokens[mine].roll(-1, 1), documents=documents[mine]).backward()
    ours = whole(model)
    if rank == 0:
        largest = max(parameter.grad.abs().max() for parameter in one.parameters())
        for name, parameter in one.named_parameters():
            error = (world * ours[name] - parameter.grad).abs().max() / largest
            assert error < 1e-10, (spec, wrapping, name, error)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for words in ("checkpoint fsdp", "selective ddp", "stream:chunks=3 ddp", "stream:chunks=3 fsdp"):
        spec, wrapping = words.split()
        check(spec, wrapping, rank, world)
        if rank == 0:
            print(words, flush=True)
    leave_processes()
