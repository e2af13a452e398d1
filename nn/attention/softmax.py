"""softmax(Q K^T / sqrt(D)) V: PyTorch's fused kernel on an accelerator, blocks of queries and batched matmuls on a CPU.

On a CPU at the lengths one trains there, PyTorch's fused kernel is several times slower than plain matmuls (they run at
the full bf16 rate of the core), so `BlockAttention` spells them out: a block of queries against all the keys it may see,
nothing else stored. With more than one block the probabilities are worked out again in the backward pass, as in
Dao et al. 2022, "FlashAttention" (arXiv:2205.14135): memory stays linear in the length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nn.context import Context

QUERY_BLOCK = 256

# B batch, H query heads, K key/value heads, G = H/K, T queries, S keys, D head dim, E = B K


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, same_document: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention with shared key/value heads.

    Shapes: q (B, H, T, D), k (B, K, S, D), v (B, K, S, Dv) -> (B, H, T, Dv), all of one dtype. The T queries are the last
    T of the S tokens; with `causal`, query t sees the keys up to S - T + t. `same_document` (B, T, S) bool: only where true.
    """
    queries, keys = q.shape[2], k.shape[2]
    if q.device.type in ("cpu", "meta") and queries > 1:
        return BlockAttention.apply(q, k, v, causal, same_document)
    mask = same_document[:, None] if same_document is not None else None
    if causal and 1 < queries and (mask is not None or queries < keys):
        past = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        mask = past if mask is None else mask & past
    is_causal = causal and mask is None and queries > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])


def visible(context: Context) -> Tensor | None:
    """(B, T, T) bool: which pairs of tokens stand in one document; None where a sequence is one document."""
    documents = context.documents
    if documents is None:
        return None
    return context.once("same document", lambda: documents[:, :, None] == documents[:, None, :])


class BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool, same_document: Tensor | None) -> Tensor:
        batch, heads, queries, _ = q.shape
        y = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)  # as the output projection will read it
        probabilities = None
        for start, end, seen in query_blocks(queries, k.shape[2], causal):
            probabilities = block_softmax(q, k, causal, same_document, start, end, seen)
            y[:, :, start:end] = (probabilities @ heads_as_batch(v)[:, :seen]).view(batch, heads, end - start, v.shape[-1])
        one_block = queries <= QUERY_BLOCK
        ctx.save_for_backward(q, k, v, same_document, probabilities if one_block else None)
        ctx.causal = causal
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v, same_document, kept = ctx.saved_tensors
        wide = torch.float32 if q.element_size() == 2 else q.dtype  # where the sums over blocks are held
        keys, values = heads_as_batch(k), heads_as_batch(v)  # (E, S, D)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
        for start, end, seen in query_blocks(q.shape[2], k.shape[2], ctx.causal):
            p = kept if kept is not None else block_softmax(q, k, ctx.causal, same_document, start, end, seen)
            dyb = grouped(dy, k.shape[1], start, end)  # (E, G T, Dv)
            dv[:, :seen] += p.mT @ dyb
            ds = torch._softmax_backward_data(dyb @ values[:, :seen].mT, p, -1, p.dtype)
            ds *= q.shape[-1] ** -0.5
            dk[:, :seen] += ds.mT @ grouped(q, k.shape[1], start, end)
            dq[:, :, start:end] = (ds @ keys[:, :seen]).view(*q.shape[:2], end - start, q.shape[-1])
        return dq, dk.to(k.dtype).view_as(k), dv.to(v.dtype).view_as(v), None, None


def query_blocks(queries: int, keys: int, causal: bool):
    """(start, end, seen): blocks of queries, and how many of the keys the last of each may see."""
    for start in range(0, queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, queries)
        yield start, end, keys - queries + end if causal else keys


def block_softmax(q, k, causal: bool, same_document: Tensor | None, start: int, end: int, seen: int) -> Tensor:
    """(E, G (end - start), seen): the attention probabilities of queries start … end over the first `seen` keys."""
    rows = grouped(q, k.shape[1], start, end)
    keys = heads_as_batch(k)[:, :seen]
    scale, groups = q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
    if causal and end - start > 1:
        unseen = torch.full((end - start, seen), -torch.inf, dtype=q.dtype, device=q.device).triu(seen - (end - start) + 1)
        scores = torch.baddbmm(unseen.repeat(groups, 1).expand(len(rows), -1, -1), rows, keys.mT, alpha=scale)
    else:
        scores = torch.baddbmm(rows.new_empty(1), rows, keys.mT, beta=0, alpha=scale)
    if same_document is not None:
        each = scores.view(q.shape[0], k.shape[1], groups, end - start, seen)  # (B, K, G, T, S)
        each.masked_fill_(~same_document[:, None, None, start:end, :seen], -torch.inf)
    return scores.softmax(-1)


def grouped(x: Tensor, kv_heads: int, start: int, end: int) -> Tensor:
    """(B, H, T, D) -> (B K, G (end - start), D): the rows of a block that read the same keys, side by side."""
    batch, heads, queries, dim = x.shape
    block = x.view(batch, kv_heads, heads // kv_heads, queries, dim)[:, :, :, start:end]
    return block.reshape(batch * kv_heads, heads // kv_heads * (end - start), dim)


def heads_as_batch(x: Tensor) -> Tensor:
    """(B, K, S, D) -> (B K, S, D)."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
