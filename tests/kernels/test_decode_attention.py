"""decode_attention: what its SPEC does not say."""

import os

import pytest
import torch
import torch.nn.functional as F

from kernels.attention import attention
from kernels.decode_attention import decode_attention
from kernels.launch import TRITON, use

interpreted = pytest.mark.skipif(not TRITON or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
paths = pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=interpreted)])


def case(B=2, H=4, K=2, T=1, S=150, D=16, DV=16, dtype=torch.float32):
    return tuple(torch.randn(B, h, t, d, dtype=dtype) for h, t, d in ((H, T, D), (K, S, D), (K, S, DV)))


@paths
@pytest.mark.parametrize("T", [1, 5])
def test_a_step_is_the_end_of_the_whole(path, T):
    """As attention over the same tokens, whatever lies in the cache behind them."""
    q, k, v = case(T=T)
    lengths = torch.tensor([131, 55])
    for b, length in enumerate(lengths):
        k[b, :, length:] = torch.nan
        v[b, :, length:] = torch.nan
    for options in ({}, dict(window=40), dict(softcap=2.0, sinks=torch.randn(4)), dict(window=1), dict(window=500, scale=0.1)):
        with use(path):
            y = decode_attention(q, k, v, lengths, **options)
        for b, length in enumerate(lengths):
            with use("torch"):
                alone = attention(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length], **options)
            torch.testing.assert_close(y[b : b + 1], alone, rtol=1e-4, atol=1e-5)


@paths
def test_rows_of_one_length_are_rows_alone(path):
    q, k, v = case(B=3, DV=24)
    with use(path):
        together = decode_attention(q, k, v, torch.full((3,), 77))
        mixed = decode_attention(q, k, v, torch.tensor([77, 0, 150]))
        last = decode_attention(q[2:], k[2:], v[2:], torch.tensor([150]))
    torch.testing.assert_close(together[0], mixed[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last[0], mixed[2], rtol=1e-5, atol=1e-6)
    assert not mixed[1].any()


@paths
def test_queries_before_the_first_key_give_nothing(path):
    q, k, v = case(T=4)
    with use(path):
        y = decode_attention(q, k, v, torch.tensor([2, 4]))
    assert not y[0, :, :2].any() and y[0, :, 2:].all() and y[1].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_pytorch_at_a_real_size(dtype):
    """Enough rows that half precision is widened in several parts."""
    q, k, v = case(B=5, H=8, S=1024, D=64, DV=64, dtype=dtype)
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.02, atol=0.002)
    keys, values = k[:, :, :1000], v[:, :, :1000]
    theirs = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    torch.testing.assert_close(decode_attention(q, k, v, torch.full((5,), 1000)), theirs, **close)
    torch.testing.assert_close(attention(q, keys, values), theirs, **close)


def test_no_gradients():
    q, k, v = case()
    assert not decode_attention(q.requires_grad_(), k, v, torch.tensor([3, 4])).requires_grad


WRONG = {
    "q": [dict(q=torch.zeros(2, 4, 16)), dict(q=torch.zeros(2, 4, 17, 16)), dict(q=torch.zeros(2, 4, 1, 16).long()),
          dict(q=torch.zeros(2, 4, 0, 16))],
    "k": [dict(k=torch.zeros(2, 3, 9, 16)), dict(k=torch.zeros(2, 2, 9, 8)), dict(k=torch.zeros(2, 2, 9, 16).half())],
    "v": [dict(v=torch.zeros(2, 2, 8, 16)), dict(v=torch.zeros(2, 2, 9, 300)), dict(v=torch.zeros(2, 2, 9, 16).double())],
    "lengths": [dict(lengths=torch.ones(2)), dict(lengths=torch.ones(3, dtype=torch.int64))],
    "window": [dict(window=0)],
    "softcap": [dict(softcap=-1.0)],
    "scale": [dict(scale=0.0)],
    "sinks": [dict(sinks=torch.zeros(2)), dict(sinks=torch.zeros(4, dtype=torch.int64))],
}  # fmt: skip


@pytest.mark.parametrize("name, wrong", [(name, wrong) for name, cases in WRONG.items() for wrong in cases])
def test_what_does_not_fit_is_named(name, wrong):
    right = dict(
        q=torch.zeros(2, 4, 1, 16), k=torch.zeros(2, 2, 9, 16), v=torch.zeros(2, 2, 9, 16), lengths=torch.tensor([3, 9])
    )
    decode_attention(**right)
    with pytest.raises(ValueError, match=f"^{name}: "):
        decode_attention(**right | wrong)
