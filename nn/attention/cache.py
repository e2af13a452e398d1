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


class WindowCache:
    """The keys and values that a window still sees: those of the first tokens and of the last ones, in the order of time.

    Room for `first + last` tokens however many come, up to `max_len`. Xiao et al. 2023, "Efficient Streaming Language
    Models with Attention Sinks" (arXiv:2309.17453), keep the first four.
    """

    def __init__(
        self, batch: int, heads: int, max_len: int, head_dim: int, *, first: int, last: int, dtype: torch.dtype, device="cpu"
    ):
        room = min(max_len, first + last)
        self.keys = torch.empty(batch, heads, room, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.first, self.max_len, self.length = first, max_len, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Give back what is kept and this call's, (B, K, kept + T, D), and keep of both what later tokens see."""
        end, room = self.length + keys.shape[2], self.keys.shape[2]
        if end > self.max_len:
            raise ValueError(f"max_len: the cache has room for {self.max_len} tokens, not for {end}")
        kept = min(self.length, room)
        pairs = [
            torch.cat([store[:, :, :kept].to(new.dtype), new], 2)
            for store, new in ((self.keys, keys), (self.values, values))
        ]
        for store, all in zip((self.keys, self.values), pairs, strict=True):
            count = all.shape[2]
            if count > room:
                all = torch.cat([all[:, :, : self.first], all[:, :, count - room + self.first :]], 2)
            store[:, :, : all.shape[2]] = all
        self.length = end
        return pairs[0], pairs[1]

    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
