import torch
from torch import Tensor, nn

from nn.attention.documents import document_spans
from nn.attention.row_cache import RowCache
from nn.attention.visible import visible
from nn.checks import at_least
from nn.context import Context

# B batch, T time, S tokens so far (earlier ones and this call's), C model dim


class RandomMixer(nn.Module):
    """Mixing by a frozen random matrix: y = softmax(R) x over the tokens, R uniform in [0, 1) and never trained.

    Yu et al. 2022, "MetaFormer Baselines for Vision" (arXiv:2210.13452), RandFormer, whose matrix is N x N for a fixed
    number of tokens. Causality is our adaptation: what a token does not see is masked before the softmax, so that each
    row still sums to 1. Row and column count from the start of the document. `max_len` is how many tokens there are rows
    for; layers of one `seed` share one matrix, which is saved with the weights. No parameters.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is all inputs: C numbers a token.
    """

    def __init__(self, dim: int, *, max_len: int = 1024, seed: int = 0):
        super().__init__()
        at_least(1, max_len=max_len)
        at_least(0, seed=seed)
        self.dim, self.max_len = dim, max_len
        drawn = torch.rand(max_len, max_len, generator=torch.Generator().manual_seed(seed), device="cpu")
        self.register_buffer("scores", torch.empty(max_len, max_len).copy_(drawn))  # on the device of the whole model

    def forward(self, x: Tensor, context: Context) -> Tensor:
        T = x.shape[1]
        if context.state is not None:
            x = context.state.append(x).to(x.dtype)  # (B, S, C)
        return self.weights(context, T, x.shape[1]).to(x.dtype) @ x

    def weights(self, context: Context, queries: int, keys: int) -> Tensor:
        """(B or 1, T, S), float32 or wider: rows sum to 1; the T queries are the last T of the S keys."""
        if keys > self.max_len:
            raise ValueError(f"max_len: the random matrix has rows for {self.max_len} tokens, not for {keys}")
        scores = self.scores[keys - queries : keys, :keys][None]
        spans = document_spans(context)
        if spans is not None:
            start = spans[0].long()[..., None]  # (B, T, 1), where each token's document begins
            j = torch.arange(keys, device=start.device)
            scores = self.scores[j[:, None] - start, (j - start).clamp(min=0)]  # (B, T, S)
        exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return exact.masked_fill(~visible(context, queries, keys), -torch.inf).softmax(-1)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> RowCache:
        return RowCache(batch, max_len, self.dim, dtype=dtype, device=device)

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return batch * max_len * self.dim * dtype.itemsize

    def mixing_flops(self, queries: int, keys: int) -> int:
        return 2 * queries * keys * self.dim
