"""Experts on different processes: tokens travel to them and what they say travels back.

Each of W processes holds E / W experts and its own tokens. Choices, sorted by expert, go to the process of their expert in
one all-to-all, whose sizes a smaller one tells beforehand, and come back in another; nothing is padded and nothing dropped.
A forward pass sends, of N K choices of C numbers, those of other processes' experts twice: about 2 N K C (W - 1) / W numbers a
process; the backward pass as many. Lepikhin et al. 2020, "GShard" (arXiv:2006.16668), section 3.2; without capacity as in
Gale et al. 2022, "MegaBlocks" (arXiv:2211.15841).
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.func import functional_call

from nn.linear import cast_once
from nn.moe.experts import Experts
from nn.moe.moe import MoE
from nn.moe.routing import counts_of
from nn.parallel.collectives import exchange, waiting


class ParallelExperts:
    """The experts of one process, used by the tokens of all: what `Experts` computes, from and for each process's own tokens.

    Of the stacks (E, out, in) rank r of the W in the mesh keeps the experts r E / W and the following; their gradients are sums
    over the tokens of all processes. `sent_bytes` counts what this process has sent to others in forward passes.
    ValueError where E does not divide by W.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh):
        self.experts, self.group = experts.experts, mesh.get_group()
        self.rank, self.world = mesh.get_local_rank(), mesh.size()
        if experts.experts % self.world:
            raise ValueError(f"experts: {experts.experts} cannot be shared among {self.world} processes evenly")
        for layer in (experts.gate, experts.up, experts.down):
            if layer is not None:
                share = distribute_tensor(layer.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
                layer.weight = nn.Parameter(share, requires_grad=layer.weight.requires_grad)
        experts.experts //= self.world
        self.own, self.sent_bytes = experts, 0

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x (N, dim), experts (N, K) int64 (E: none), weights (N, K) -> (N, dim)."""
        K, x = experts.shape[1], cast_once(x)
        order = experts.flatten().argsort(stable=True)
        counts = counts_of(experts, self.experts).view(self.world, -1)  # (W, E / W): for the experts of each process
        arriving = torch.empty_like(counts)
        with waiting():
            dist.all_to_all_single(arriving, counts, group=self.group)
        send, receive = counts.sum(1).tolist(), arriving.sum(1).tolist()
        order = order[: sum(send)]  # those without an expert stay
        rows = self.travel(x[order // K], send, receive)
        here = torch.arange(self.own.experts, device=x.device).repeat(self.world).repeat_interleave(arriving.flatten())
        own = {name: parameter.to_local() for name, parameter in self.own.named_parameters()}
        y = functional_call(self.own, own, (rows, here[:, None], weights.new_ones(len(rows), 1)))
        y = self.travel(y, receive, send) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // K, y.to(x.dtype))

    def travel(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        self.sent_bytes += (sum(send) - send[self.rank]) * rows.shape[1] * rows.element_size()
        return exchange(rows, send, receive, self.group)


def share_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """In place: every mixture of the model keeps the experts of this process only, a mesh of one axis having the others."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.dispatch = ParallelExperts(module.experts, mesh)
