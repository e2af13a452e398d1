"""The PyTorch path of kernels/attention.py: a block of queries against all the keys it may see, nothing else stored.

On a CPU at the lengths one trains there, plain batched matmuls are several times faster than PyTorch's fused kernel: they
run at the full rate of the core, in bfloat16 too (there the scores are rounded to the dtype, as any matmul's result is).
Up to KEEP queries the probabilities are kept for the backward pass; beyond, they are worked out again a block at a time,
as in Dao et al. 2022, "FlashAttention" (arXiv:2205.14135), and memory stays linear in the length.
"""

import torch
from torch import Tensor

QUERY_BLOCK = 128
KEEP = 256

# B batch, H query heads, K key/value heads, G = H / K, T queries, S keys, D head dim, Dv that of the values, E = B K,
# t queries of a block, s keys that it sees


class Blocks:
    """The PyTorch path's view of a call: blocks of queries, the keys each needs, and which of these are hidden from whom."""

    def __init__(self, q: Tensor, k: Tensor, low, high, causal: bool, window: int | None, first_tokens: int | None):
        self.B, self.H, self.T, self.D = q.shape
        self.K, self.S = k.shape[1:3]
        self.low, self.high, self.causal, self.window, self.first_tokens = low, high, causal, window, first_tokens or 0
        self.device, self.shift = q.device, self.S - self.T
        self.known = low is None or q.device.type == "meta" or torch.compiler.is_compiling()

    def __iter__(self):
        """(start, end, pieces): queries, and the ranges of keys that they see among them, at least one."""
        for start in range(0, self.T, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, self.T)
            first, last = 0, end + self.shift if self.causal and self.low is None else self.S
            if not self.known and self.B:
                first, last = self.low[:, start:end].min().item(), self.high[:, start:end].max().item()
                last = max(first, last)
            near, far = first, last
            if self.window is not None and start + self.shift >= self.first_tokens:
                near = min(max(first, start + self.shift - self.window + 1), last)
                far = max(near, min(last, end + self.shift + self.window - 1))
            early = min(self.first_tokens, near, last)
            yield start, end, [(first, early), (near, far)] if first < early else [(near, far)]

    def hidden(self, start: int, end: int, pieces) -> tuple[Tensor, Tensor | None]:
        """Positions apart, i - j (t, s), and what is hidden, (t, s) or (B, 1, 1, t, s) bool; None where nothing is."""
        j = torch.cat([torch.arange(a, b, device=self.device) for a, b in pieces])
        i = torch.arange(start + self.shift, end + self.shift, device=self.device)[:, None]
        apart, hidden = i - j, None
        if self.low is not None:
            hidden = (j < self.low[:, start:end, None]) | (j >= self.high[:, start:end, None])
            hidden = hidden[:, None, None]
        elif self.causal and end - start > 1:
            hidden = apart < 0
        if self.window is not None:
            far = (apart.abs() >= self.window) & (i >= self.first_tokens) & (j >= self.first_tokens)
            hidden = far if hidden is None else hidden | far
        return apart, hidden

    def rows(self, x: Tensor, start: int, end: int) -> Tensor:
        """(B, H, T, D) -> (B K, G t, D): the rows of a block that read the same keys, side by side."""
        return x.view(self.B, self.K, self.H // self.K, self.T, x.shape[-1])[:, :, :, start:end].reshape(
            self.B * self.K, self.H // self.K * (end - start), x.shape[-1]
        )


def take(x: Tensor, pieces) -> Tensor:
    """Ranges of rows of x (E, S, D), one after the other."""
    return x[:, slice(*pieces[0])] if len(pieces) == 1 else torch.cat([x[:, a:b] for a, b in pieces], 1)


def block_probabilities(blocks, q, keys, sinks, slopes, start, end, pieces, scale, softcap, want_lse):
    """p (E, G t, s) of queries start … end; lse and the sink's share (B, K, G, t), d capped / d raw score, or None."""
    rows, groups = blocks.rows(q, start, end), blocks.H // blocks.K
    apart, hidden = blocks.hidden(start, end, pieces)
    shape = blocks.B, blocks.K, groups, *apart.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    slope = share = None
    if hidden is not None and hidden.ndim == 2 and not softcap and slopes is None:
        bias = torch.zeros(apart.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
        s = torch.baddbmm(bias.repeat(groups, 1).expand(len(rows), -1, -1), rows, keys.mT, alpha=scale)
    else:
        s = torch.baddbmm(rows.new_empty(1), rows, keys.mT, beta=0, alpha=scale)
        if softcap:
            s = s.to(wide).div_(softcap).tanh_()
            slope = 1 - s * s
            s.mul_(softcap)
        if slopes is not None:
            s = s.to(wide)
            s.view(shape).sub_(slopes.to(wide).view(blocks.K, groups, 1, 1) * apart.abs())
        if hidden is not None:
            s.view(shape).masked_fill_(hidden, -torch.inf)
    p = s.softmax(-1)
    if hidden is not None and hidden.ndim > 2:
        p.view(shape).masked_fill_(hidden.all(-1, keepdim=True), 0)  # a row that sees nothing
    lse = s.to(wide).logsumexp(-1).view(shape[:-1]) if want_lse or sinks is not None else None
    if sinks is not None:
        sink = sinks.to(wide).view(blocks.K, groups, 1)
        p.view(shape).mul_(torch.sigmoid(lse - sink)[..., None])
        lse, share = torch.logaddexp(lse, sink), torch.sigmoid(sink - lse)
    return p, lse, share, slope


def torch_forward(q, k, v, sinks, slopes, low, high, causal, window, first_tokens, scale, softcap, want_lse):
    blocks = Blocks(q, k, low, high, causal, window, first_tokens)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)  # (E, S, D)
    y = q.new_empty(blocks.B, blocks.T, blocks.H, v.shape[-1]).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)) if want_lse else None
    shares, kept = None if sinks is None else torch.empty_like(lse), []
    for start, end, pieces in blocks:
        p, part, share, _ = block_probabilities(
            blocks, q, take(keys, pieces), sinks, slopes, start, end, pieces, scale, softcap, want_lse
        )
        y[:, :, start:end] = (p.to(q.dtype) @ take(values, pieces)).view(blocks.B, blocks.H, end - start, v.shape[-1])
        if want_lse:
            lse[:, :, start:end] = part.flatten(1, 2)
        if sinks is not None:
            shares[:, :, start:end] = share.flatten(1, 2)
        if blocks.T <= KEEP and not softcap:
            kept.append(p)
    return y, lse, shares, kept


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, whose dtypes may be narrower."""
    total.baddbmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)


def torch_backward(q, k, v, sinks, slopes, low, high, kept, dy, dlse, causal, window, first_tokens, scale, softcap):
    blocks = Blocks(q, k, low, high, causal, window, first_tokens)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    dq = torch.empty_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    dk, dv = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
    for n, (start, end, pieces) in enumerate(blocks):
        seen, p, slope = take(keys, pieces), kept[n] if kept else None, None
        if p is None:
            p, _, _, slope = block_probabilities(blocks, q, seen, sinks, slopes, start, end, pieces, scale, softcap, False)
        grad = blocks.rows(dy, start, end)  # (E, G t, Dv)
        dp = grad @ take(values, pieces).mT
        ds = torch._softmax_backward_data(dp.to(p.dtype), p, -1, p.dtype)
        if dlse is not None:
            ds += p * blocks.rows(dlse[..., None].to(p.dtype), start, end)
        if slope is not None:
            ds *= slope
        ds = ds.mul_(scale).to(q.dtype)
        at = 0
        p, rows = p.to(q.dtype), blocks.rows(q, start, end)
        for a, b in pieces:
            add_product(dv[:, a:b], p[..., at : at + b - a].mT, grad)
            add_product(dk[:, a:b], ds[..., at : at + b - a].mT, rows)
            at += b - a
        dq[:, :, start:end] = (ds @ seen).view(blocks.B, blocks.H, end - start, blocks.D)
    return dq, dk.to(k.dtype).view_as(k), dv.to(v.dtype).view_as(v)
