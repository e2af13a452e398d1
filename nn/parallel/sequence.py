"""The positions of a row, shared out among processes: each works on its own tokens and gathers the row where it must."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from nn.context import Context
from nn.parallel.collectives import gather, scatter_sum

# B batch, T positions of a row, P ranks, S = T / P positions of each


class Sequence:
    """Which of a row's T positions each of a group's P processes holds: T / P of them.

    In order, or with `ring` > 1 in zig-zag: the row is cut into 2 `ring` chunks of which place r on the ring has chunks r and
    2 ring - 1 - r, so that under a causal mask all have the same to do; what one place has is cut in order among its
    P / ring processes, which follow each other in the group.
    """

    def __init__(self, group: dist.ProcessGroup, ring: int = 1):
        self.group, self.ring = group, ring
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def order(self, T: int, device: torch.device | str = "cpu") -> Tensor:
        """(P, T / P) int64: the positions of each process. ValueError where T does not divide."""
        chunks = self.size if self.ring == 1 else 2 * self.size
        if T % chunks:
            raise ValueError(f"seq_len: {T} positions cannot be shared among {self.size} processes in {chunks} parts evenly")
        at = torch.arange(T, device=device)
        if self.ring > 1:
            at = at.view(2 * self.ring, -1)
            at = torch.cat([at[: self.ring], at[self.ring :].flip(0)], 1)  # (ring, T / ring)
        return at.reshape(self.size, -1)

    def part(self, x: Tensor) -> Tensor:
        """(B, T, …) -> (B, S, …): what this process has of it."""
        return x.index_select(1, self.order(x.shape[1], x.device)[self.rank])

    def whole(self, x: Tensor) -> Tensor:
        """(B, S, …) -> (B, T, …), from all processes. Its gradient is summed over them."""
        y = gather(x, self.group, 1)
        return y if self.ring == 1 else y.index_select(1, self.order(y.shape[1], y.device).flatten().argsort())

    def summed(self, x: Tensor) -> Tensor:
        """(B, T, …), of which every process has a summand -> (B, S, …) of their sum."""
        x = x if self.ring == 1 else x.index_select(1, self.order(x.shape[1], x.device).flatten())
        return scatter_sum(x, self.group, 1)

    def share(self, context: Context) -> Context:
        """The context of this process's tokens; that of the row is its `whole`."""
        positions, documents, domains = context.positions, context.documents, context.domains
        positions = self.part(positions.expand(len(context.tokens), -1) if positions.ndim == 1 else positions)
        documents = None if documents is None else self.part(documents)
        domains = self.part(domains) if domains is not None and domains.shape[1] > 1 else domains
        own = dict(tokens=self.part(context.tokens), positions=positions, documents=documents, domains=domains)
        return replace(context, **own, shared={}, whole=context)
