import torch
from torch import Tensor


class RowCache:
    """One row of numbers for each token so far: the decoding state of mixers that remember something else than heads.

    Room for `max_len` tokens is taken at once; `length` of them are filled. Shape of rows: (B, max_len, width).
    """

    def __init__(self, batch: int, max_len: int, width: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.rows = torch.empty(batch, max_len, width, dtype=dtype, device=device)
        self.length = 0

    def append(self, rows: Tensor) -> Tensor:
        """Store this call's rows (B, T, width); give back those of all tokens so far (B, length, width)."""
        start, end = self.length, self.length + rows.shape[1]
        if end > self.rows.shape[1]:
            raise ValueError(f"max_len: the cache has room for {self.rows.shape[1]} tokens, not for {end}")
        self.rows.narrow(1, start, end - start).copy_(rows)
        self.length = end
        return self.rows.narrow(1, 0, end)

    def bytes(self) -> int:
        return self.rows.nbytes
