"""Ring attention: keys and values go round, and what a process's queries find in each part is merged by its log-sum-exp.

Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (arXiv:2310.01889). With w_i the share
of part i in the softmax,

    lse = log sum_i exp(lse_i)      w_i = exp(lse_i - lse)      y = sum_i w_i y_i
    dy_i = w_i dy                   dlse_i = w_i (dy . (y_i - y) + dlse)

The backward pass works y_i and lse_i out again as keys and values come by once more, their gradients travelling one place
behind: memory is that of one's own positions and of one part on its way. Each of R places sends (R - 1) / R of all keys and
values forward, and of them and of their gradients, in float32 at least, backward.

A place has two chunks of the row, r and 2 R - 1 - r of 2 R ("zig-zag"), so that under a causal mask each has as much to do;
the unit of work is a chunk of queries against a chunk of keys, and pairs of which none sees the other are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import attention, merge
from nn.attention.documents import document_spans
from nn.context import Context
from nn.parallel.collectives import Passing
from nn.parallel.sequence import Sequence

# B batch, H query heads, K key/value heads, T positions of the row, R places, S = T / R positions of one, c = S / 2 of a chunk


class Ring:
    """The places of a sequence's ring, of which this process has one; others of its place have other heads."""

    def __init__(self, sequence: Sequence):
        beside = sequence.size // sequence.ring  # processes of one place
        self.group, self.places, self.place = sequence.group, sequence.ring, sequence.rank // beside
        self.next, self.last = ((sequence.rank + step) % sequence.size for step in (beside, -beside))

    def chunks(self, place: int) -> tuple[int, int]:
        return place, 2 * self.places - 1 - place

    def pass_on(self, x: Tensor) -> Passing:
        return Passing(x, self.next, self.last, self.group)

    def parts(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(whose they are, keys, values), one's own first; the next part is under way while one is worked on."""
        here = torch.cat([k.flatten(), v.flatten()])
        for step in range(self.places):
            passing = self.pass_on(here) if step < self.places - 1 else None
            yield (self.place - step) % self.places, *views(here, k, v)
            here = passing.arrived() if passing else None


def views(flat: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What lies one behind the other in `flat`, in the shapes of k and v."""
    return flat[: k.numel()].view(k.shape), flat[k.numel() :].view(v.shape)


@dataclass
class Sight:
    """An interval of the row's keys for each of a place's queries, low … high - 1, (B or 1, S) both; and of a chunk of queries
    and one of the row's keys, (2, 2 R): whether any sees any (1), and whether all see all (2)."""

    low: Tensor
    high: Tensor
    seen: list[list[int]]

    def of_chunks(self, half: int, chunk: int, batch: int) -> tuple[Tensor, Tensor]:
        """What one chunk of queries sees of a chunk of keys, counted from its first: (B, c) int32 both."""
        c = self.low.shape[1] // 2
        bounds = (x[:, half * c : half * c + c] - chunk * c for x in (self.low, self.high))
        return tuple(x.clamp(0, c).to(torch.int32).expand(batch, -1).contiguous() for x in bounds)


def sights(context: Context, ring: Ring, window: int | None, first: int) -> list[Sight]:
    """What the place's queries see of the row that `context` is of, in intervals without a key in common.

    All that causality and documents leave; or with a window what is near, and the `first` tokens of all where it does not reach
    them; each bound grows with the query.
    """
    T, causal, device = context.tokens.shape[1], context.causal, context.tokens.device
    c = T // (2 * ring.places)
    at = torch.cat([torch.arange(c, device=device) + chunk * c for chunk in ring.chunks(ring.place)])  # (S,)
    spans = document_spans(context)
    if spans is None:
        low, high = torch.zeros_like(at)[None], (at + 1 if causal else torch.full_like(at, T))[None]
    else:
        low, high = (x.index_select(1, at).long() for x in spans)
    found = [(low, high)]
    if window is not None:
        near = low.maximum(at - window + 1), high.minimum(at + window)
        found = [near]
        if first and not causal:
            if spans is not None:
                raise ValueError("documents: global_tokens of an encoder are the first of a row; give each document its own")
            early = at < first  # these see everything
            near = tuple(torch.where(early, 0, x) for x in near)
            found = [near, (torch.where(early, low, T), torch.where(early, high, T))]
        if first:
            found.append((low, (low + first).minimum(near[0]).maximum(low)))
    return [Sight(*pair, seen_chunks(*pair, c, ring.places)) for pair in found]


def seen_chunks(low: Tensor, high: Tensor, c: int, places: int) -> list[list[int]]:
    """(2, 2 R): 0 where none of a half of the queries sees any key of a chunk, 2 where all of them see all, or else 1."""
    columns = []
    for start in range(0, 2 * places * c, c):
        some, whole = low.clamp(min=start) < high.clamp(max=start + c), (low <= start) & (high >= start + c)
        some, whole = (x.unflatten(1, (2, c)).movedim(1, 0).flatten(1) for x in (some, whole))  # (2, B c)
        columns.append(some.any(1).int() + whole.all(1).int())
    return torch.stack(columns, 1).tolist()


def of_pair(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor], whole: bool, apart: int, scale: float, softcap: float,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and lse of a chunk of queries over the keys within `bounds`, or the `whole`, of a chunk that is `apart` chunks before.

    ALiBi's distances are of the row: keys before the queries are given as if c further ones, seen by none, stood between their
    end and that of the queries; what is then missing, the same for all, comes off lse. Keys behind them are read backwards.
    """
    options = dict(causal=False, scale=scale, softcap=softcap, alibi=slopes, with_lse=True)
    if slopes is None or apart == 0:
        return attention(q, k, v, shared_spans=None if whole else bounds, **options)
    c, (low, high) = q.shape[2], bounds
    if apart < 0:
        q, k, v = (x.flip(2) for x in (q, k, v))
        low, high = (c - high).flip(1).contiguous(), (c - low).flip(1).contiguous()
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, c)) for x in (k, v))  # (B, K, 2 c, ·)
    y, lse = attention(q, k, v, shared_spans=(low, high), **options)
    lse = lse - slopes.to(lse.dtype)[:, None] * (c * (abs(apart) - 1))
    return (y, lse) if apart > 0 else (y.flip(2), lse.flip(2))


class RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, ring: Ring, seen: list[Sight], options: dict):
        wide = torch.promote_types(q.dtype, torch.float32)
        found: list[tuple[Tensor, Tensor] | None] = [None, None]
        for place, keys, values in ring.parts(k, v):
            for half, mine, theirs, *where in pairs(ring, place, seen, q.shape):
                y, lse = of_pair(q[:, :, mine], keys[:, :, theirs], values[:, :, theirs], *where, **options)
                found[half] = (y.to(wide), lse) if found[half] is None else merge(*found[half], y, lse)
        y, lse = torch.cat([y for y, _ in found], 2).to(q.dtype), torch.cat([lse for _, lse in found], 2)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.given = ring, seen, options
        return y, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor, dlse: Tensor):
        q, k, v, y, lse = ctx.saved_tensors
        ring, seen, options = ctx.given
        wide = torch.promote_types(q.dtype, torch.float32)
        lost = dlse - (dy.to(wide) * y).sum(-1)  # (B, H, S)
        dq, own, passing = torch.zeros_like(q, dtype=wide), None, None
        for step, (place, keys, values) in enumerate(ring.parts(k, v)):
            grads = keys.new_zeros(k.numel() + v.numel(), dtype=wide)
            dk, dv = views(grads, k, v)
            for _, mine, theirs, *where in pairs(ring, place, seen, q.shape):
                part = [x.detach().requires_grad_() for x in (q[:, :, mine], keys[:, :, theirs], values[:, :, theirs])]
                with torch.enable_grad():
                    found = of_pair(*part, *where, **options)
                share = torch.exp(found[1].detach() - lse[:, :, mine])  # w_i (B, H, c)
                dlse_i = share * ((dy[:, :, mine].to(wide) * found[0].detach()).sum(-1) + lost[:, :, mine])
                dy_i = (share[..., None] * dy[:, :, mine]).to(q.dtype)
                totals = dq[:, :, mine], dk[:, :, theirs], dv[:, :, theirs]
                for total, x in zip(totals, torch.autograd.grad(found, part, (dy_i, dlse_i)), strict=True):
                    total += x
            if step == 0:
                own = grads  # what the others find for these comes last
                continue
            if passing is not None:
                grads += passing.arrived()
            passing = ring.pass_on(grads)
        if passing is not None:
            own += passing.arrived()
        dk, dv = views(own, k, v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def pairs(ring: Ring, place: int, seen: list[Sight], shape: torch.Size) -> Iterator[tuple]:
    """The chunks of queries, of shape (B, H, S, D), and of a place's keys of which some see some.

    Which half of the queries, the slices of both in their places, what each query sees, whether that is all, and how many
    chunks they are apart.
    """
    B, _, S, _ = shape
    halves = slice(0, S // 2), slice(S // 2, S)
    for sight in seen:
        for i, a in enumerate(ring.chunks(ring.place)):
            for j, b in enumerate(ring.chunks(place)):
                if sight.seen[i][b]:
                    yield i, halves[i], halves[j], sight.of_chunks(i, b, B), sight.seen[i][b] == 2, a - b


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, context: Context, sequence: Sequence, *, scale: float, window: int | None = None,
    global_tokens: int = 0, softcap: float = 0.0, slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(B, H, S, Dv) of a place's queries (B, H, S, D), keys (B, K, S, D) and values (B, K, S, Dv), which see all places'.

    `context` is that of the whole row. The options are those of kernels/attention.py.
    """
    ring, first = Ring(sequence), global_tokens if window is not None else 0
    seen = context.once(("ring", sequence, window, first), lambda: sights(context, ring, window, first))
    slopes = None if slopes is None else slopes.to(q.device)
    y, lse = RingAttention.apply(q, k, v, ring, seen, dict(scale=scale, softcap=softcap, slopes=slopes))
    if sinks is None:
        return y
    return y * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None].to(y.dtype)  # it takes part once, at the end
