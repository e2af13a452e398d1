"""Which keys a query sees, as an interval: what all masks of kernels/attention.py are made of.

Causality, a prefix seen by all, packed documents and padding each bound an interval of keys, and so does their
intersection; only global tokens stand outside their interval. Both bounds grow with the query, so the queries that see one
key are an interval too, and the same arithmetic serves the two sides of the matrix of scores. A tile of rows asks for the
hull of their intervals, skips what lies outside, and masks only the tiles that not all rows see whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import tl, triton

# B batch, T queries, S keys


def visible(i, j, causal, window, global_tokens, documents, prefix, key_lengths):
    """(B or 1, T, S) bool, on arrays or tensors: whether the token at i (T, 1) sees the one at j (S,)."""
    seen = (i == i) & (j[None, None] == j)
    if causal and prefix is None:
        seen = seen & (j <= i)
    elif causal:
        seen = seen & ((j <= i) | (j < prefix[:, None, None]))
    if window is not None:
        seen = seen & ((abs(i - j) < window) | (i < global_tokens) | (j < global_tokens))
    if documents is not None:
        seen = seen & (documents[:, len(j) - len(i) :, None] == documents[:, None])
    if key_lengths is not None:
        seen = seen & (j < key_lengths[:, None, None])
    return seen


def spans(
    B: int, T: int, S: int, *, causal: bool = True, documents: Tensor | None = None, prefix: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of which keys each query sees some, whatever the window: (low, high), both (B, T) int32, keys low … high - 1.

    What `attention` makes of its own `documents`, `prefix` and `key_lengths`; layers that share them can share this.
    """
    device = next(x for x in (documents, prefix, key_lengths) if x is not None).device
    low, high = torch.zeros(B, T, dtype=torch.int64, device=device), torch.full((B, T), S, device=device)
    if causal:
        past = torch.arange(S - T + 1, S + 1, device=device).expand(B, T)
        high = past if prefix is None else past.maximum(prefix[:, None]).clamp(max=S)
    if documents is not None:
        at = torch.arange(S, device=device).expand(B, S)
        borders = documents[:, 1:] != documents[:, :-1]
        starts = F.pad(torch.where(borders, at[:, 1:], 0), (1, 0)).cummax(1).values if S else at
        ends = F.pad(torch.where(borders, at[:, 1:], S), (0, 1), value=S).flip(1).cummin(1).values.flip(1) if S else at
        low, high = starts[:, S - T :], high.minimum(ends[:, S - T :])
    if key_lengths is not None:
        high = high.minimum(key_lengths[:, None])
    return low.to(torch.int32).contiguous(), high.to(torch.int32).contiguous()


def document_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """(1, length) int64: what `documents` takes, from where documents begin and the last ends, (N + 1,) rising from 0."""
    return torch.searchsorted(cu_seqlens[1:], torch.arange(length, device=cu_seqlens.device), right=True)[None]


@triton.jit
def intervals(x, low, high, count, limit, shift, back, ahead, window, exempt):
    """For rows x of `count`: what each sees of 0 … limit - 1 within its window, and without it: near, far, start, end.

    Row x stands at x + shift on the other side and sees from `back` before it to `ahead` after it, and what low and high
    say. The first `exempt` rows have no window. Rows past the last do as the last.
    """
    x = tl.minimum(x, count - 1)
    start, end = tl.maximum(x + shift - back, 0), tl.minimum(x + shift + ahead, limit)
    if low is not None:
        start, end = tl.maximum(start, tl.load(low + x)), tl.minimum(end, tl.load(high + x))
    near, far = start, end
    if window is not None:
        near, far = tl.maximum(start, x + shift - window + 1), tl.minimum(end, x + shift + window)
        if exempt is not None:
            far = tl.where(x < exempt, end, far)  # what lies before near is a global token itself
    return near, far, start, end


@triton.jit
def tiles(sight, others, BLOCK: tl.constexpr):
    """Which tiles of the other side rows see: those of global tokens [g, h), then [first, last), of which [full, cut) whole."""
    near, far, start, end = sight
    first = tl.min(near, 0) // BLOCK
    last = tl.maximum(tl.cdiv(tl.max(far, 0), BLOCK), first)
    full = tl.minimum(tl.cdiv(tl.max(near, 0), BLOCK), last)
    cut = tl.maximum(tl.min(far, 0) // BLOCK, full)
    g, h = first, first
    if others is not None:
        g = tl.min(start, 0) // BLOCK
        h = tl.maximum(tl.minimum(tl.cdiv(tl.minimum(others, tl.max(end, 0)), BLOCK), first), g)
    return g, h, first, last, full, cut


@triton.jit
def how_many(plan, MASKED: tl.constexpr):
    """Tiles that all rows see whole, or those that need their mask."""
    g, h, first, last, full, cut = plan
    return (h - g) + (last - first) - (cut - full) if MASKED else cut - full


@triton.jit
def nth(t, plan, MASKED: tl.constexpr):
    """The t-th of these: of [full, cut); or of [g, h) and what is left of [first, last)."""
    g, h, first, last, full, cut = plan
    if not MASKED:
        return full + t
    t += g
    t += tl.where(t >= h, first - h, 0)
    return t + tl.where(t >= full, cut - full, 0)


@triton.jit
def sees(y, sight, others):
    """(rows, y): whether a row sees y, as one comparison of how far inside it lies: predicates are dear on some devices."""
    near, far, start, end = sight
    y = y[None, :]
    inside = tl.minimum(y - near[:, None], far[:, None] - 1 - y)
    if others is not None:
        whole = tl.minimum(y - start[:, None], end[:, None] - 1 - y)
        inside = tl.maximum(inside, tl.minimum(whole, others - 1 - y))
    return inside >= 0
