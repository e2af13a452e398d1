import torch
from torch import Tensor


class KVCache:
    """The keys and values of all tokens so far: the decoding state of softmax attention.

    Room for `max_len` tokens is taken at once; `length` of them are filled. Shapes: keys and values (B, K, max_len, D).
    """

    def __init__(self, batch: int, heads: int, max_len: int, head_dim: int, *, dtype: torch.dtype, device="cpu"):
        self.keys = torch.empty(batch, heads, max_len, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store this call's keys and values (B, K, T, D); give back those of all tokens so far (B, K, length, D)."""
        start, end = self.length, self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"max_len: the cache has room for {self.keys.shape[2]} tokens, not for {end}")
        self.keys.narrow(2, start, end - start).copy_(keys)
        self.values.narrow(2, start, end - start).copy_(values)
        self.length = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
