"""What each of several processes does in tests/nn/test_moe_processes.py: its part of a batch, beside the whole by one.

    torchrun --nproc-per-node 2 -m tests.nn.moe_processes
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from models.stack import FFNS
from nn.context import Context
from nn.moe.expert_parallel import share_experts
from nn.spec import build
from optim.parallel.processes import leave_processes

DIM, TOKENS = 12, 20


def make(words: str):
    torch.manual_seed(0)
    moe = build(f"moe:experts=8:width=10:{words}", FFNS, "ffn", DIM).double()
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.5)
    return moe


def losses(moe, x, g):
    y = moe(x, Context(torch.zeros(x.shape[:2], dtype=torch.int64), torch.arange(x.shape[1])))
    return y, (y * g).sum() + (0 if moe.auxiliary is None else len(x) * x.shape[1] * moe.auxiliary)


def check(words: str, shared: bool, rank: int, world: int) -> int:
    """Outputs, gradients and auxiliary losses of the parts equal those of the whole; the bytes sent."""
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(world, TOKENS, DIM, dtype=torch.float64, generator=generator) for _ in range(2))
    whole, part = make(words + ":scope=micro"), make(words + ":scope=global")
    if shared:
        share_experts(part, init_device_mesh("cpu", (world,)))
    with torch.no_grad():  # the whole batch knows nothing of other processes
        assert len(part(x[rank : rank + 1], Context(torch.zeros(1, TOKENS, dtype=torch.int64), torch.arange(TOKENS)))) == 1
    y, loss = losses(part, x[rank : rank + 1], g[rank : rank + 1])
    loss.backward()
    everything, total = losses(whole, x, g)
    total.backward()
    torch.testing.assert_close(y, everything[rank : rank + 1], rtol=1e-10, atol=1e-12)
    dist.all_reduce(loss.data)
    torch.testing.assert_close(loss, total, rtol=1e-10, atol=1e-12)
    theirs = dict(whole.named_parameters())
    for name, parameter in part.named_parameters():
        expected = theirs[name].grad
        grad = parameter.grad.full_tensor() if shared and "experts." in name else parameter.grad
        if grad is parameter.grad:
            dist.all_reduce(grad)
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-11)
    if not shared:
        return 0
    assert part.dispatch.sent_bytes == 2 * bytes_between(part, rank, world)  # two passes
    return part.dispatch.sent_bytes


def bytes_between(part, rank: int, world: int) -> int:
    """Bytes this process sends in a pass: choices of others' experts, and what its own say to the tokens of others."""
    matrix = torch.zeros(world, world, dtype=torch.int64)  # choices of a row's tokens among a column's experts
    matrix[rank] = torch.bincount(part.routing.experts.flatten() // (8 // world), minlength=world)
    dist.all_reduce(matrix)
    return int(matrix[rank].sum() + matrix[:, rank].sum() - 2 * matrix[rank, rank]) * DIM * 8


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    routed = "router=topk/over=all:top_k=2:balance=0.5:z=0.1"
    for words in ("top_k=2", "router=bias:top_k=3", routed, "top_k=2:expert_gradients=sqrt"):
        check(words, False, rank, world)
        sent = torch.tensor(check(words, True, rank, world))
        dist.all_reduce(sent)
        if rank == 0:
            print(f"{words}: {sent.item()} bytes", flush=True)
    try:
        share_experts(build(f"moe:experts={world + 1}:width=2", FFNS, "ffn", DIM), init_device_mesh("cpu", (world,)))
    except ValueError as error:
        if rank == 0:
            print(f"refused: {error}", flush=True)
    leave_processes()
