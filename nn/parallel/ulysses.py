"""DeepSpeed Ulysses: between all-to-alls, a process has all positions of its share of the heads.

Jacobs et al. 2023, "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer Models"
(arXiv:2309.14509), section 3.1. Each of P processes holds T / P positions of q, k and v, all heads of them; an all-to-all makes
that T positions of H / P heads, over which any attention runs as it is; a second one brings its output back:

    q, k, v (B, T / P, H, D) -- to_shares --> (B, T, H / P, D) -- attention --> (B, T, H / P, D) -- to_own --> (B, T / P, H, D)

A process sends 4 (T C / P) (P - 1) / P numbers a layer and pass where all of q, k, v and y are C wide: as much when T and P
grow together. Of K key heads that P does not divide, each is sent lcm(K, P) / K times.
"""

from inspect import isfunction
from math import lcm
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from nn.parallel.collectives import exchange
from nn.parallel.sequence import Sequence

# B batch, S positions of a process, P processes of an exchange, H query heads, K key/value heads, D head dim


class Shares:
    """Processes that turn positions, of which each has some with all their heads, into heads with all their positions.

    They are `ranks` of the sequence's group, all of whose processes take part in the call, each among its own ranks.
    """

    def __init__(self, sequence: Sequence, ranks: range):
        self.group, self.count, self.place = sequence.group, len(ranks), sequence.rank - ranks.start
        self.sizes = [int(rank in ranks) for rank in range(sequence.size)]  # a row to each of them, none to others

    def to_shares(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """(B, S, n) each -> (B, P S, n / P) each, positions in the order of the ranks; all in one message to each."""
        if self.count == 1:
            return parts
        packed = torch.cat([x.unflatten(-1, (self.count, -1)) for x in parts], -1)  # (B, S, P, sum of n / P)
        packed = exchange(packed.movedim(2, 0), self.sizes, self.sizes, self.group)  # (P, B, S, ·)
        return packed.movedim(0, 1).flatten(1, 2).split([x.shape[-1] // self.count for x in parts], -1)

    def to_own(self, x: Tensor) -> Tensor:
        """(B, P S, n) -> (B, S, P n): the inverse."""
        if self.count == 1:
            return x
        x = exchange(x.unflatten(1, (self.count, -1)).movedim(1, 0), self.sizes, self.sizes, self.group)  # (P, B, S, n)
        return x.movedim(0, 2).flatten(2)

    def of(self, x: Tensor, dim: int = 0) -> Tensor:
        """This process's share of something that all have whole."""
        return x.chunk(self.count, dim)[self.place]

    def repeats(self, heads: int) -> int:
        """How many times each of `heads` is sent, so that every process has what its queries read."""
        return lcm(heads, self.count) // heads

    def check(self, heads: int) -> None:
        if heads % self.count:
            raise ValueError(f"heads: {heads} cannot be shared among {self.count} processes evenly")


class PartOf:
    """A layer as it is for some of its heads: `own` in the place of what it has for all of them, and all else its own."""

    def __init__(self, layer: Any, **own: Any):
        self.__dict__.update(own, layer=layer)

    def __getattr__(self, name: str) -> Any:
        found = getattr(type(self.layer), name, None)
        return MethodType(found, self) if isfunction(found) else getattr(self.layer, name)


def by_heads(shares: Shares, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, S, D), keys and values (B, K, S, ·) -> those of the process's heads, (B, H / P, P S, ·)."""
    shares.check(q.shape[1])
    times = shares.repeats(k.shape[1])
    k, v = (u if times == 1 else u.repeat_interleave(times, 1) for u in (k, v))
    widths = [u.shape[-1] for u in (q, k, v)]
    rows = shares.to_shares(*(u.transpose(1, 2).flatten(2) for u in (q, k, v)))
    return tuple(u.unflatten(-1, (-1, D)).transpose(1, 2) for u, D in zip(rows, widths, strict=True))


def by_positions(shares: Shares, y: Tensor) -> Tensor:
    """(B, H / P, P S, D) -> (B, H, S, D)."""
    D = y.shape[-1]
    return shares.to_own(y.transpose(1, 2).flatten(2)).unflatten(-1, (-1, D)).transpose(1, 2)


def own_heads(shares: Shares, layer: Any, heads: int, kv_heads: int) -> PartOf:
    """An attention layer of `heads` and `kv_heads` as it is for this process's: its slopes, bias and sinks are theirs."""

    def bias(context, _, queries: int, keys: int) -> Tensor | None:  # made for all heads
        whole = layer.bias(context, heads, queries, keys)
        return None if whole is None else shares.of(whole, 1)

    own = dict(heads=heads // shares.count, kv_heads=kv_heads * shares.repeats(kv_heads) // shares.count, bias=bias)
    for name in ("slopes", "sinks"):
        whole = getattr(layer, name, None)
        own[name] = None if whole is None else shares.of(whole)
    return PartOf(layer, **own)
