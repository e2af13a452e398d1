"""The PyTorch path of kernels/linear_attention.py: many chunks at once, as products of matrices.

Within a chunk every query meets every key; between chunks goes the state. Heads that share queries and keys share the
products with them: their values stand side by side, as columns of one matrix. A long sequence goes in segments, so that
what is made on the way stays small. Queries in bfloat16 ask for products in bfloat16; decays, sums and states are float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import power_of_2

SEGMENT = 1024  # times

# B batch, T time, H heads, G groups of R heads that share q and k, n chunks of L times, D key dim, V value dim


def chunk_length(T: int, gate: int) -> int:
    """L of the PyTorch path."""
    return min(32 if gate == 2 else 64, max(1, power_of_2(T) // 2))


def chunked(x: Tensor, L: int) -> Tensor:
    """(B, T, G, ...) as (B, G, n, L, ...), the last chunk filled with zeros."""
    B, T = x.shape[:2]
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -T % L))
    return x.unflatten(1, (-1, L)).movedim(3, 1).contiguous()


def whole(x: Tensor, T: int) -> Tensor:
    """(B, G, n, L, ...) as (B, T, G, ...)."""
    return x.movedim(1, 3).flatten(1, 2)[:, :T]


def blocks(P: Tensor, s: int) -> Tensor:
    """Of P (..., L, L) the blocks between later and earlier halves of 2 s, as (..., s, s, L / 2 s), a view."""
    many = P.shape[-1] // (2 * s)
    return P.unflatten(-1, (many, 2, s)).unflatten(-4, (many, 2, s))[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2)


def split(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """x (..., L, D) as the earlier and the later halves of blocks of 2 s, each (..., L / 2 s, s, D)."""
    return x.unflatten(-2, (-1, 2, s)).unbind(-3)


def until(x: Tensor) -> Tensor:
    """Sums over the times of a chunk up to each."""
    return x.cumsum(-2)


def since(x: Tensor) -> Tensor:
    """Sums over the times of a chunk from each on."""
    return x.flip(-2).cumsum(-2).flip(-2)


def before(x: Tensor) -> Tensor:
    return F.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def after(x: Tensor) -> Tensor:
    return F.pad(since(x[..., 1:, :]), (0, 0, 0, 1))


def columns(x: Tensor) -> Tensor:
    """(B, G, n, R, L, V) as (B, G, n, L, R V): the heads of a group side by side."""
    return x.transpose(3, 4).flatten(4)


class Chunks:
    """One call's arguments, cut into chunks: q and k (B, G, n, L, D), v (B, G, n, R, L, V), g (…, R, L, 1), (…, L, D) or None.

    Every exponent is a sum of its own, not a difference of longer sums, which would lose the digits of the small ones.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, runs: Tensor | None, scale: float, L: int):
        (self.T, self.H), self.G = v.shape[1:3], q.shape[2]
        self.scale, self.wide = scale, torch.promote_types(v.dtype, torch.float32)
        self.narrow = q.dtype if q.dtype == torch.bfloat16 else self.wide
        self.gate = 0 if g is None else g.ndim - 2
        self.L, self.n = L, -(-self.T // L)
        self.q, self.k, self.v = chunked(q, L), chunked(k, L), self.by_head(v)
        # decays to a time, from it on, and through the chunk
        self.seen = self.left = self.through = v.new_ones((), dtype=self.wide)
        if g is not None:
            g = g.to(self.wide)
            g = self.g = self.by_head(g.unsqueeze(-1)) if self.gate == 1 else chunked(g, L)
            self.seen, self.left, self.through = until(g).exp_(), after(g).exp_(), g.sum(-2, keepdim=True).exp_()
        mask = torch.ones(L, L, dtype=torch.bool, device=v.device).tril()
        if runs is not None:
            runs = torch.cat([runs, runs[:, -1:].expand(-1, -self.T % L)], 1).unflatten(1, (-1, L)).unsqueeze(1)
            runs = runs if self.gate == 2 else runs.unsqueeze(3)  # (B, 1, n, L) or, for each head, (B, 1, n, 1, L)
            last = runs[..., -1:]
            earlier = torch.cat([torch.zeros_like(last[:, :, :1]), last[:, :, :-1]], 2)
            self.seen = self.seen * (runs == earlier).unsqueeze(-1)
            self.left = self.left * (runs == last).unsqueeze(-1)
            self.through = self.through * (earlier == last).unsqueeze(-1)
            mask = mask & (runs.unsqueeze(-1) == runs.unsqueeze(-2))
        self.w = mask.to(self.wide) * scale
        if self.gate == 1:
            between = g.expand(*g.shape[:-1], L).tril(-1).cumsum_(-2)  # (i, j): the sum over j < l <= i
            self.w = between.exp_().mul_(self.w)
        elif self.gate == 2:
            self.w, self.through = self.w.unsqueeze(-3) if runs is not None else self.w, self.through.mT

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b: the factors are rounded to the dtype of the queries, the product is float32 at least."""
        return (a.to(self.narrow) @ b.to(self.narrow)).to(self.wide)

    def by_head(self, x: Tensor) -> Tensor:
        """(B, T, H, V) as (B, G, n, R, L, V)."""
        return chunked(x.unflatten(2, (self.G, -1)), self.L).transpose(3, 4).contiguous()

    def heads(self, x: Tensor) -> Tensor:
        """(B, G, n, L, R V) as (B, G, n, R, L, V), a view."""
        return x.unflatten(-1, (self.H // self.G, -1)).transpose(3, 4)

    def to_group(self, state: Tensor) -> Tensor:
        """(B, H, D, V) as (B, G, D, R V)."""
        return state.unflatten(1, (self.G, -1)).transpose(2, 3).flatten(3)

    def to_heads(self, state: Tensor) -> Tensor:
        return state.unflatten(-1, (self.H // self.G, -1)).transpose(2, 3).flatten(1, 2).clone()

    def halves(self, s: int) -> tuple[Tensor, Tensor]:
        """The decay from the earlier halves to the middle, and from there to the later ones."""
        earlier, later = split(self.g, s)
        return after(earlier).exp_(), until(later).exp_()

    def sizes(self) -> list[int]:
        return [1 << i for i in range(self.L.bit_length() - 1)]

    def scores(self) -> Tensor:
        """(B, G, n, R, L, L)."""
        if self.gate < 2:
            return self.dot(self.q, self.k.mT).unsqueeze(3) * self.w
        P = self.w.new_zeros(*self.q.shape[:-1], self.L)
        P.diagonal(dim1=-2, dim2=-1).copy_((self.q.to(self.wide) * self.k).sum(-1))
        for s in self.sizes():
            earlier, later = self.halves(s)
            found = self.dot(split(self.q, s)[1] * later, (split(self.k, s)[0] * earlier).mT)  # (..., many, s, s)
            blocks(P, s).copy_(found.movedim(-3, -1))
        return P.unsqueeze(3).mul_(self.w)

    def scores_backward(self, P: Tensor, dP: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of q, k and g, from the scores and their gradient, which are overwritten."""
        pairs = None
        if self.gate == 1:  # the sum over i >= t > j
            earlier = torch.ones(self.L, self.L, dtype=self.wide, device=P.device).triu(1)
            pairs = (P.mul_(dP) @ earlier).tril_().sum(-2).unsqueeze(-1)
        dP = dP.mul_(self.w).sum(3)
        if self.gate < 2:
            return self.dot(dP, self.k), self.dot(dP.mT, self.q), pairs
        own = dP.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        dq, dk, dg = own * self.k, own * self.q, torch.zeros_like(self.g)
        for s in self.sizes():
            earlier, later = self.halves(s)
            q, k, pairs = split(self.q, s)[1], split(self.k, s)[0], blocks(dP, s).movedim(-1, -3)
            x, y = self.dot(pairs, k * earlier) * later, self.dot(pairs.mT, q * later) * earlier
            for grads, place, new in ((dq, 1, x), (dk, 0, y), (dg, 1, since(q * x)), (dg, 0, before(k * y))):
                split(grads, s)[place].add_(new)
        return dq, dk, dg

    def pass_on(self, S: Tensor, added: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        """The recurrence over chunks: the state before each of them (back: after), and what is left at the end."""
        n = added.shape[2]
        through = self.through.expand(1, 1, n, 1, 1) if self.through.ndim == 0 else self.through
        if self.gate < 2 and self.through.ndim:  # (B, G or 1, n, R or 1, 1, 1), for each column
            ones = added.new_ones(1, 1, 1, self.H // self.G, 1, added.shape[-1] * self.G // self.H)
            through = columns(self.through * ones)
        states = torch.empty_like(added, dtype=self.narrow)
        for i in reversed(range(n)) if back else range(n):
            states[:, :, i] = S
            S = torch.addcmul(added[:, :, i], through[:, :, i], S)
        return states, S

    def sides(self, values: Tensor, keys: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and columns of values with the decay on the side where it is one number a row: the values', or a gate's keys."""
        return (keys * decay, columns(values)) if self.gate == 2 else (keys, columns(values * decay))

    def forward(self, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, written = self.sides(self.v, self.k, self.left)
        states, S = self.pass_on(self.to_group(S), self.dot(k.mT, written), False)
        o, seen = self.dot(self.scores(), self.v), self.seen * self.scale
        o += self.heads(self.dot(self.q * seen, states)) if self.gate == 2 else self.heads(self.dot(self.q, states)) * seen
        return self.out(o), states, self.to_heads(S)

    def out(self, x: Tensor) -> Tensor:
        """(B, G, n, R, L, V) as (B, T, H, V)."""
        return whole(x.transpose(3, 4), self.T).flatten(2, 3).contiguous()

    def backward(self, do: Tensor, dS: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        do, seen = self.by_head(do), self.seen * self.scale
        q, read = self.sides(do, self.q, seen)
        k, written = self.sides(self.v, self.k, self.left)
        dstates, dinitial = self.pass_on(self.to_group(dS), self.dot(q.mT, read), True)
        P, dP = self.scores(), self.dot(do, self.v.mT)
        dv, later = self.dot(P.mT, do), self.heads(self.dot(k, dstates))
        dv += later if self.gate == 2 else later * self.left
        dq, dk = self.dot(read, states.mT), self.dot(written, dstates.mT)
        if self.gate == 2:
            dq, dk = dq.mul_(seen), dk.mul_(self.left)
        dq_pairs, dk_pairs, pairs = self.scores_backward(P, dP)
        dg = dq.new_zeros(())
        if self.gate == 1:  # what flows from before t to t and later: into, out of and through the chunk, and pairs in it
            into = (do * self.heads(self.dot(self.q, states))).sum(-1, keepdim=True).mul_(seen)
            out_of = (self.v * later).sum(-1, keepdim=True).mul_(self.left)
            kept = self.heads((states.to(self.wide) * dstates).sum(-2, keepdim=True)).sum(-1, keepdim=True) * self.through
            dg = self.out(pairs + since(into) + before(out_of) + kept).squeeze(-1)
        elif self.gate == 2:
            kept = (states.to(self.wide) * dstates).sum(-1).unsqueeze(-2) * self.through.mT
            dg = whole(pairs + since(self.q * dq) + before(self.k * dk) + kept, self.T).contiguous()
        dq, dk = (whole(x, self.T).contiguous() for x in (dq + dq_pairs, dk + dk_pairs))
        return dq, dk, self.out(dv), dg, self.to_heads(dinitial)


def segment(start: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, runs: Tensor | None, scale: float) -> Chunks:
    """SEGMENT times of a call from `start` on, with chunks of the length that all of it has."""
    L = chunk_length(v.shape[1], 0 if g is None else g.ndim - 2)
    now = slice(start, start + SEGMENT)
    if runs is not None:  # the state that comes in belongs to the run 0
        runs = runs[:, now] - (runs[:, start - 1 : start] if start else 0)
    return Chunks(q[:, now], k[:, now], v[:, now], g if g is None else g[:, now], runs, scale, L)


@torch.library.custom_op("rosetta::linear_attention", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor, runs: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the states that the chunks begin with, and the last state."""
    o, states, S = [], [], initial
    with torch.autocast(v.device.type, enabled=False):  # products are of float32 inside
        for start in range(0, max(1, v.shape[1]), SEGMENT):
            made, begun, S = segment(start, q, k, v, g, runs, scale).forward(S)
            o.append(made)
            states.append(begun)
    return torch.cat(o, 1), torch.cat(states, 2), S


@attend.register_fake
def _(q, k, v, g, initial, runs, scale):
    (B, T, H, V), (G, D) = v.shape, q.shape[2:]
    L, narrow = chunk_length(T, 0 if g is None else g.ndim - 2), q.dtype if q.dtype == torch.bfloat16 else initial.dtype
    states = initial.new_empty(B, G, -(-T // L), D, H // G * V, dtype=narrow)
    return initial.new_empty(v.shape), states, torch.empty_like(initial)


@torch.library.custom_op("rosetta::linear_attention_backward", mutates_args=())
def attend_backward(
    do: Tensor, dS: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, states: Tensor, runs: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g (of no shape without it) and the initial state."""
    found = []
    with torch.autocast(v.device.type, enabled=False):
        for start in reversed(range(0, max(1, v.shape[1]), SEGMENT)):
            chunks = segment(start, q, k, v, g, runs, scale)
            begun = states[:, :, start // chunks.L :][:, :, : chunks.n]
            *grads, dS = chunks.backward(do[:, start : start + SEGMENT], dS, begun)
            found.insert(0, grads)
    dq, dk, dv, dg = (torch.cat(parts, 1) if parts[0].ndim else parts[0] for parts in zip(*found, strict=True))
    return dq, dk, dv, dg, dS


@attend_backward.register_fake
def _(do, dS, q, k, v, g, states, runs, scale):
    return *(dS.new_empty(x.shape) for x in (q, k, v)), dS.new_empty(() if g is None else g.shape), torch.empty_like(dS)
