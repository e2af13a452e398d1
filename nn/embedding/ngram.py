import torch
from torch import Tensor, nn

from nn.context import Context

NONE = -1  # the token before the first
MULTIPLIER = 1_000_003  # a prime well above the vocabulary, so that the sums of different n-grams spread over the rows


class NgramEmbedding(nn.Module):
    """A vector for each n-gram: the last n tokens, hashed to one of `rows` rows of a learned table.

    What follows a pair of tokens is looked up instead of computed, so the layers above need not learn it; n-grams that
    share a row share a vector. Huang et al. 2025, "Over-Tokenized Transformer" (arXiv:2501.16975); hashing as in
    Svenstrup et al. 2017, "Hash Embeddings" (arXiv:1709.03933), with one hash function. Costs no FLOPs.

    Shapes: x (B, T, dim), whose numbers are not used, -> (B, T, dim). An n-gram does not reach over the beginning of a
    document. The decoding state is the last n - 1 tokens.
    """

    def __init__(self, dim: int, *, n: int = 2, rows: int = 32768):
        super().__init__()
        if n < 2:
            raise ValueError(f"n: an n-gram has at least 2 tokens, not {n}")
        if rows < 1:
            raise ValueError(f"rows: at least 1, not {rows}")
        self.n, self.rows = n, rows
        self.table = nn.Embedding(rows, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.table(self.rows_of(context))

    def rows_of(self, context: Context) -> Tensor:
        """(B, T) int64: which row of the table the n-gram has that ends at each token."""
        tokens, length = context.tokens, context.tokens.shape[1]
        if context.state is None:
            earlier = tokens.new_full((tokens.shape[0], self.n - 1), NONE)
        else:
            earlier = context.state.tokens
        history = torch.cat([earlier, tokens], dim=1)  # (B, n - 1 + T)
        if context.state is not None:
            context.state.tokens = history[:, length:]
        code = tokens
        for back in range(1, self.n):
            before = history[:, self.n - 1 - back :][:, :length]  # the token `back` places earlier
            code = code * MULTIPLIER + torch.where(context.positions >= back, before, NONE)
        return code % self.rows

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"):
        return RecentTokens(torch.full((batch, self.n - 1), NONE, device=device))

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return batch * (self.n - 1) * torch.int64.itemsize

    def mixing_flops(self, queries: int, keys: int) -> int:
        return 0


class RecentTokens:
    """The last tokens of each sequence, (B, n - 1) int64."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens

    def bytes(self) -> int:
        return self.tokens.nbytes
