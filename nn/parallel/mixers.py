"""Mixers whose positions several processes share: what becomes of each kind of them.

Attention     exchanges positions for heads (ulysses.py), sends keys and values round (ring.py), or does both: of R U processes,
              U that follow each other in the group exchange among themselves, and the keys of their heads go round R places.
              Chen et al. 2024, "LongVILA: Scaling Long-Context Visual Language Models for Long Videos" (arXiv:2408.10188):
              the exchange within a machine, where it is cheap, the ring between them
Mamba-2       exchanges positions for heads: a process convolves and scans the whole row for the channels of its own heads
n-grams       ask for the tokens of the row, which every process has: nothing is sent
the others    gather x and compute the whole row on every process, which keeps its own part: correct, but no faster than one
              process and no smaller. Each sends its T / P positions to P - 1 others, and as much in the backward pass
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nn.attention.attend import Attend
from nn.attention.gqa import GQA
from nn.attention.mhe import MHE
from nn.attention.mla import MLA
from nn.attention.tpa import TPA
from nn.context import Context
from nn.embedding.ngram import NgramEmbedding
from nn.moe.moa import MoA
from nn.parallel.ring import ring_attention
from nn.parallel.sequence import Sequence
from nn.parallel.ulysses import PartOf, Shares, by_heads, by_positions, own_heads
from nn.position.none import NoPosition
from nn.ssm.mamba2 import Mamba2


class SharedAttention:
    """What an attention layer calls `attend`, for positions that a sequence's processes share.

    `layer` and `attend` are the layer, or the object in it that attends, and its method `attend(q, k, v, context)`.
    """

    def __init__(self, layer: Any, attend: Callable, sequence: Sequence):
        self.layer, self.attend, self.sequence = layer, attend, sequence
        beside = sequence.size // sequence.ring
        first = sequence.rank // beside * beside
        self.shares = Shares(sequence, range(first, first + beside))

    @torch._disable_dynamo  # torch.compiler.disable, but imports the compiler only when it is called
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """(B, H, S, Dv) of queries (B, H, S, D), keys (B, K, S, D) and values (B, K, S, Dv) of the process's positions."""
        part = own_heads(self.shares, self.layer, q.shape[1], k.shape[1])
        q, k, v = by_heads(self.shares, q, k, v)
        if self.sequence.ring == 1:
            y = self.attend(part, q, k, v, context.whole)
        else:
            options = {name: getattr(part, name) for name in ("window", "global_tokens", "softcap") if hasattr(part, name)}
            options |= dict(scale=part.scale, slopes=part.slopes, sinks=part.sinks)
            y = ring_attention(q, k, v, context.whole, self.sequence, **options)
        return by_positions(self.shares, y)


class SharedScan:
    """What a Mamba-2 layer calls `scan`, for positions that a sequence's processes share."""

    def __init__(self, layer: Mamba2, sequence: Sequence):
        self.layer, self.sequence, self.shares = layer, sequence, Shares(sequence, range(sequence.size))

    @torch._disable_dynamo  # torch.compiler.disable, but imports the compiler only when it is called
    def __call__(self, u: Tensor, d: Tensor, context: Context) -> Tensor:
        """(B, S, E) of u (B, S, E + 2 G N) and d (B, S, H)."""
        layer, shares, P = self.layer, self.shares, self.shares.count
        shares.check(layer.heads)
        *parts, d = shares.to_shares(*self.parts(u), d)
        u = torch.cat(parts, -1)  # (B, T, ·), of the process's channels
        if self.sequence.ring > 1:
            order = self.sequence.order(u.shape[1], u.device).flatten()
            u, d = (x.index_select(1, order.argsort()) for x in (u, d))
        groups = layer.groups * shares.repeats(layer.groups) // P
        own = dict(heads=layer.heads // P, groups=groups, inner=layer.inner // P)
        channels = torch.cat([shares.of(x) for x in self.parts(torch.arange(len(layer.taps), device=u.device))])
        own |= {name: x if x is None else x[channels] for name in ("taps", "taps_bias") for x in [getattr(layer, name)]}
        own |= {name: shares.of(getattr(layer, name)) for name in ("dt_bias", "A_log", "D")}
        y = Mamba2.scan(PartOf(layer, **own), u, d, context.whole)  # (B, T, E / P)
        return shares.to_own(y if self.sequence.ring == 1 else y.index_select(1, order))

    def parts(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X, B and C of (…, E + 2 G N), the last two as often as they are sent."""
        layer, groups = self.layer, self.layer.groups
        X, *rest = u.split([layer.inner, groups * layer.state, groups * layer.state], -1)
        times = self.shares.repeats(groups)
        return X, *(x.unflatten(-1, (groups, -1)).repeat_interleave(times, -2).flatten(-2) for x in rest)


class WholeRow:
    """A layer that every process computes for the whole row, keeping its own part."""

    def __init__(self, forward: Callable[[Tensor, Context], Tensor], sequence: Sequence):
        self.forward, self.sequence = forward, sequence

    @torch._disable_dynamo  # torch.compiler.disable, but imports the compiler only when it is called
    def __call__(self, x: Tensor, context: Context) -> Tensor:
        return self.sequence.part(self.forward(self.sequence.whole(x), context.whole))


def share_sequence(model: nn.Module, group: dist.ProcessGroup, *, ring: int = 1) -> None:
    """In place: the processes of `group` share the positions of each row; `ring` of them keep their keys and values apart.

    The model's `forward` then takes whole rows on every process, and gives logits, or the sum of losses, of the process's own
    positions. Parameters stay whole, keep their names, and get the gradient of the own positions: that of the row is the SUM
    over the group. Feed-forward layers do not notice; a mixture of experts routes and bounds the own tokens, and balances them
    by themselves too, unless its scope is global. To be called before anything that cuts layers. ValueError for heads or places
    that do not divide.
    """
    size = dist.get_world_size(group)
    if ring < 1 or size % ring:
        raise ValueError(f"ring: {size} processes do not make a ring of {ring} places evenly")
    sequence = Sequence(group, ring)
    biased = type(model.position).bias is not NoPosition.bias
    for residual in model.stack:
        for layer in getattr(residual.layer, "branches", [residual.layer]):
            if hasattr(layer, "init_state"):
                share_mixer(layer, sequence, biased)
    model.sequences.insert(0, sequence)


def share_mixer(layer: nn.Module, sequence: Sequence, biased: bool) -> None:
    """In place: one mixer; `biased` is whether the model's positions have a learned bias."""
    kind = type(layer)
    if isinstance(layer, NgramEmbedding):
        rows_of = layer.rows_of
        layer.rows_of = lambda context: sequence.part(rows_of(context.whole))
    elif isinstance(layer, Mamba2) and kind.forward is Mamba2.forward:
        layer.scan = SharedScan(layer, sequence)
        layer.scan.shares.check(layer.heads)
    elif isinstance(layer, GQA) and kind.forward is GQA.forward and kind.attend is GQA.attend:
        layer.attend = shared_attention(layer, kind.attend, layer.heads, sequence, biased)
    elif isinstance(layer, (MLA, TPA, MHE, MoA)):
        layer.attend = shared_attention(layer.attend, Attend.__call__, layer.attend.heads, sequence, biased)
    else:
        layer.forward = WholeRow(layer.forward, sequence)


def shared_attention(layer: Any, attend: Callable, heads: int, sequence: Sequence, biased: bool) -> SharedAttention:
    if biased and sequence.ring > 1:
        raise ValueError("ring: a learned bias stands beside scores that are held whole; ulysses takes it, a ring does not")
    shared = SharedAttention(layer, attend, sequence)
    shared.shares.check(heads)
    return shared
