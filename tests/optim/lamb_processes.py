"""What each of several processes does in tests/optim/test_lamb_of_processes.py: LAMB on its parts, beside LAMB on the whole.

torchrun --nproc-per-node 2 -m tests.optim.lamb_processes
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from kernels.shards import local
from optim import Lamb
from optim.lamb import lengths


def main() -> None:
    dist.init_process_group("gloo")
    mesh, generator = init_device_mesh("cpu", (dist.get_world_size(),)), torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    kinds = [
        ((6, 5), Shard(0)),
        ((4, 6), Shard(1)),
        ((5, 3), Shard(0)),
        ((1, 4), Shard(0)),
        ((7,), Replicate()),
        ((3, 3), None),
    ]
    whole = [torch.nn.Parameter(draw(*shape)) for shape, _ in kinds]
    spread = lambda x, place: x if place is None else distribute_tensor(x, mesh, [place])  # noqa: E731
    parts = [torch.nn.Parameter(spread(p.detach().clone(), place)) for p, (_, place) in zip(whole, kinds, strict=True)]
    one, many = Lamb(whole, lr=0.1, weight_decay=0.3), Lamb(parts, lr=0.1, weight_decay=0.3)
    for _ in range(4):
        for p, q, (shape, place) in zip(whole, parts, kinds, strict=True):
            p.grad = draw(*shape)
            q.grad = spread(p.grad.clone(), place)
        one.step()
        many.step()
    for p, q in zip(whole, parts, strict=True):
        full = q.full_tensor() if hasattr(q, "full_tensor") else q
        torch.testing.assert_close(full, p, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lengths([local(q)], [q])[0], p.norm(), rtol=1e-12, atol=0)
    if dist.get_rank() == 0:
        print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
