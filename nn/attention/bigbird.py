import random
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.block_sparse_attention import block_sparse_attention
from nn.attention.gqa import GQA
from nn.attention.visible import visible
from nn.checks import at_least
from nn.context import Context
from nn.position.none import NoPosition

# B batch, T time, S keys, H heads, R blocks of a text


@lru_cache(maxsize=64)
def block_mask(
    rows: int, heads: int, window: int, global_blocks: int, random_blocks: int, causal: bool, seed: int
) -> Tensor:
    """(heads, R, R) bool: near blocks, the first ones, and for each row of each head some at random.

    Causal rows draw from what stands before them, so that a longer text only adds rows; the others from the whole text.
    """
    at = torch.arange(rows)
    near = (at[:, None] - at).abs() <= window
    whole = (at < global_blocks) | (at[:, None] < global_blocks)
    mask = (near | whole).repeat(heads, 1, 1)
    for head in range(heads):
        for row in range(rows):
            left = [c for c in range(row if causal else rows) if not mask[head, row, c]]
            drawn = random.Random(f"{seed} {head} {row}").sample(left, min(random_blocks, len(left)))
            mask[head, row, drawn] = True
    return mask & (at[:, None] >= at) if causal else mask


class BigBird(GQA):
    """Block-sparse attention: each block of queries sees its neighbours, the first blocks, and some blocks at random.

    Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences" (arXiv:2007.14062), section 2. `window`: near blocks on
    each side; `global_blocks`: blocks at the beginning that see and are seen by all (the paper's encoders also take the
    last); `random_blocks`: further ones, drawn for each row and head from `seed`. The cost is linear in T.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is a KVCache of 2 H D numbers a token. Packed documents, and texts that
    come in pieces, hold their scores whole: there blocks begin where a document does.
    """

    def __init__(
        self,
        dim: int,
        position: NoPosition | None = None,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        bias: bool = False,
        block: int = 64,
        window: int = 1,
        global_blocks: int = 1,
        random_blocks: int = 3,
        seed: int = 0,
    ):
        super().__init__(dim, position, heads=heads, head_dim=head_dim, bias=bias)
        at_least(0, window=window, global_blocks=global_blocks, random_blocks=random_blocks)
        if block not in (16, 32, 64, 128):
            raise ValueError(f"block: 16, 32, 64 or 128 tokens, not {block}")
        self.block = block
        self.pattern = (window, global_blocks, random_blocks)
        self.seed = seed

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """(B, H, T, D) of queries (B, H, T, D), keys and values (B, H, S, D)."""
        T, S = q.shape[2], k.shape[2]
        if context.documents is None and T == S:
            mask = self.mask(-(-S // self.block), context.causal).to(q.device)
            return block_sparse_attention(q, k, v, mask, block=self.block, causal=context.causal, scale=self.scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen(context, T, S), scale=self.scale)

    def mask(self, rows: int, causal: bool) -> Tensor:
        return block_mask(rows, self.heads, *self.pattern, causal, self.seed)

    def seen(self, context: Context, queries: int, keys: int) -> Tensor:
        """(B or 1, H, T, S) bool: which keys each query sees, blocks being counted from the beginning of each document."""
        positions = context.positions if context.documents is not None else torch.arange(keys, device=context.tokens.device)
        blocks = (positions // self.block).view(-1, keys)  # (B or 1, S)
        mask = self.mask(-(-keys // self.block), context.causal).to(blocks.device)
        pairs = mask[:, blocks[:, keys - queries :, None], blocks[:, None, :]]  # (H, B or 1, T, S)
        return pairs.transpose(0, 1) & visible(context, queries, keys)[:, None]
