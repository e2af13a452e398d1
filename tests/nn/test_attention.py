"""The caches of keys and values, and of rows."""

import pytest
import torch

from nn.attention.cache import KVCache, WindowCache
from nn.attention.row_cache import RowCache


def test_cache():
    cache = KVCache(2, 3, 5, 4, dtype=torch.float64)
    assert cache.bytes() == 2 * 2 * 3 * 5 * 4 * 8
    k, v = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    cache.append(k[:, :, :2], v[:, :, :2])
    keys, values = cache.append(k[:, :, 2:], v[:, :, 2:])
    assert torch.equal(keys, k) and torch.equal(values, v) and cache.length == 5
    with pytest.raises(ValueError, match="^max_len: the cache has room for 5 tokens, not for 6$"):
        cache.append(k[:, :, :1], v[:, :, :1])
    assert cache.length == 5


def test_window_cache():
    """It gives back what is kept and what is new, and keeps the first and the last, through calls of any length."""
    cache, rows = WindowCache(1, 1, 20, 1, first=2, last=3, dtype=torch.float64), torch.arange(12.0).double().view(1, 1, 12, 1)
    seen = [cache.append(part, -part)[0].flatten().tolist() for part in rows.split([3, 1, 5, 3], dim=2)]
    assert seen == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 6, 7, 8, 9, 10, 11]]
    assert cache.bytes() == 2 * 5 * 8 and cache.length == 12
    with pytest.raises(ValueError, match="^max_len: the cache has room for 20 tokens, not for 24$"):
        cache.append(rows, rows)


def test_row_cache():
    cache, rows = RowCache(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    cache.append(rows[:, :3])
    assert torch.equal(cache.append(rows[:, 3:]), rows) and cache.bytes() == 2 * 4 * 3 * 8
    with pytest.raises(ValueError, match="^max_len: the cache has room for 4 tokens, not for 5$"):
        cache.append(rows[:, :1])
