"""What each of several processes does in tests/optim/test_lamb_of_processes.py: optimizers that look at more than one number,
LAMB at a parameter and SparseAdamW at a row, on this process's parts, beside the same on the whole.

torchrun --nproc-per-node 2 -m tests.optim.lamb_processes
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from kernels.shards import local
from optim import Lamb, SparseAdamW
from optim.lamb import lengths
from optim.parallel.processes import leave_processes

KINDS = [
    ((6, 5), Shard(0)),
    ((4, 6), Shard(1)),
    ((5, 3), Shard(0)),
    ((1, 4), Shard(0)),
    ((4, 2, 3), Shard(2)),
    ((7,), Replicate()),
    ((3, 3), None),
]


def compare(make) -> None:
    mesh, generator = init_device_mesh("cpu", (dist.get_world_size(),)), torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    whole = [torch.nn.Parameter(draw(*shape)) for shape, _ in KINDS]
    spread = lambda x, place: x if place is None else distribute_tensor(x, mesh, [place])  # noqa: E731
    parts = [torch.nn.Parameter(spread(p.detach().clone(), place)) for p, (_, place) in zip(whole, KINDS, strict=True)]
    one, many = make(whole, lr=0.1, weight_decay=0.3), make(parts, lr=0.1, weight_decay=0.3)
    for step in range(4):
        for p, q, (shape, place) in zip(whole, parts, KINDS, strict=True):
            p.grad = draw(*shape)
            p.grad[step % len(p)] = 0  # a row that no process uses
            p.grad[(step + 1) % len(p)].view(-1)[: 1 + p[0].numel() // 2] = 0  # and one that the first does not use
            q.grad = spread(p.grad.clone(), place)
        one.step()
        many.step()
    for p, q in zip(whole, parts, strict=True):
        full = q.full_tensor() if hasattr(q, "full_tensor") else q
        torch.testing.assert_close(full, p, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lengths([local(q)], [q])[0], p.norm(), rtol=1e-12, atol=0)
    if dist.get_rank() == 0:
        print(f"{make.__name__}: equal", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    compare(Lamb)
    compare(SparseAdamW)
    leave_processes()
