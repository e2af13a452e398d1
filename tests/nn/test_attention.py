"""The cache of keys and values."""

import pytest
import torch

from nn.attention.cache import KVCache


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
